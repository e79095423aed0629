"""vLLM on a GPU: asked in one batch, and how far its answers are from a live model's.

Its kernels for adapters take 16 bits there, so that an answer is as far from the float32 truth as
16 bits are: what the live model itself loses in the same dtype says how far that is.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel

VOCAB, NEW = 96, 8
ROWS = [[7, 23, 41, 5, 66, 12, 30, 9], [3, 88, 17, 17, 52]]
Asked = Sequence[tuple[list[int], Path | None]]


class Answer(NamedTuple):
    """The tokens after a prompt, greedily, and the log-probabilities `[tokens, VOCAB]` of each."""

    tokens: list[int]
    logprobs: torch.Tensor


class Engine:
    """A model folder in vLLM."""

    def __init__(self, model: Path, dtype: str, **settings: Any) -> None:
        from vllm import LLM

        self._numbers: dict[Path, int] = {}
        self.llm = LLM(
            str(model),
            dtype=dtype,
            max_model_len=32,
            max_logprobs=VOCAB,
            enforce_eager=True,
            gpu_memory_utilization=0.04,
            kv_cache_memory_bytes=1 << 27,
            disable_log_stats=True,
            distributed_executor_backend="uni",
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            **settings,
        )

    def ask(self, asked: Asked, **told: Any) -> list[Answer]:
        """Answer all rows in one batch, each by its adapter. `told`: to vLLM of every adapter."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        requests: list[LoRARequest | None] = []
        for _, lora in asked:
            number = None if lora is None else self._numbers.setdefault(lora, len(self._numbers))
            requests.append(
                None if number is None else LoRARequest(str(lora), number + 1, str(lora), **told)
            )
        for request in filter(None, requests):
            self.llm.llm_engine.add_lora(request)  # refused in a step, it would stop the engine
        sampling = SamplingParams(
            temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=VOCAB, detokenize=False
        )
        done = self.llm.generate(
            [TokensPrompt(prompt_token_ids=row) for row, _ in asked],
            sampling,
            lora_request=requests,
            use_tqdm=False,
        )
        answers = []
        for output in (each.outputs[0] for each in done):
            found = torch.full((NEW, VOCAB), torch.nan)
            for at, known in enumerate(output.logprobs):
                for token, entry in known.items():
                    found[at, token] = entry.logprob
            answers.append(Answer(list(output.token_ids), found))
        return answers


@contextmanager
def engine(model: Path, dtype: str = "bfloat16", **settings: Any) -> Iterator[Engine]:
    """An engine, whose memory is given back. `settings`: vLLM's."""
    from vllm.distributed import cleanup_dist_env_and_memory

    made = None
    try:
        made = Engine(model, dtype, **settings)
        yield made
    finally:
        if made is not None:
            made.llm.llm_engine.engine_core.shutdown()
            del made.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def likely(model: Any, row: list[int], tokens: list[int]) -> torch.Tensor:
    """A live model's log-probabilities of each of `tokens` and all others in its place."""
    ids = torch.tensor([[*row, *tokens[:-1]]], device=next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(row) - 1 :]
    found: torch.Tensor = logits.float().log_softmax(-1).cpu()
    return found


class Measured(NamedTuple):
    """`error`: the largest difference of vLLM's log-probabilities to the live model's in float32.
    `noise`: the same of the live model in vLLM's dtype. `effect`: what the adapter changes of them
    at most. `of_effect`: how far vLLM's change by the adapter is from the live one, at most.
    `tokens`: the share that is likeliest in the live model too, or as near as `error`."""

    error: float
    noise: float
    effect: float
    of_effect: float
    tokens: float


def measure(
    found: Answer, base: Answer, row: list[int], live: Any, plain: Any, dtype: torch.dtype
) -> Measured:
    """How far `found` is from `live` after `row`. `base`: vLLM's answer without the adapter, and
    `plain` the live model without it."""
    truth = likely(live, row, found.tokens)
    narrow = copy.deepcopy(live if isinstance(live, PeftModel) else plain).to("cuda", dtype)
    error = float((found.logprobs - truth).abs().max())
    wide = truth if isinstance(live, PeftModel) else likely(plain, row, found.tokens)
    noise = float((likely(narrow, row, found.tokens) - wide).abs().max())
    effect = truth[0] - likely(plain, row, found.tokens)[0]
    moved = found.logprobs[0] - base.logprobs[0]  # of the same prompt alone
    chosen = truth.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    same = (chosen >= truth.amax(1) - 2 * error).double().mean()
    assert not found.logprobs.isnan().any()
    return Measured(
        error, noise, float(effect.abs().max()), float((moved - effect).abs().max()), float(same)
    )


def judge(
    request: pytest.FixtureRequest,
    name: str,
    answers: Mapping[int, Answer],
    bases: Mapping[int, Answer],
    live: Any,
    plain: Any,
    share: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Assert that the answers to `ROWS` are the live model's: within four times its own noise, or
    the share of what the adapter changes that a quantized kernel costs."""
    for at, found in answers.items():
        one = measure(found, bases[at], ROWS[at], live, plain, dtype)
        told = {key: round(value, 6) for key, value in one._asdict().items()}
        request.node.user_properties.append((f"{name}, row {at}", told))
        assert one.effect > 5 * one.of_effect, told
        assert one.error <= 4 * one.noise or one.of_effect <= share * one.effect, told
        assert one.tokens == 1
