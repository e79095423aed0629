"""vLLM inside this process, for the proof: loader, kernels and LoRA code are its server's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from converters.errors import DoraExportError, MissingError
from converters.model.base import BaseModel

TOP = 20  # the likeliest tokens of each position, whose log-probabilities are told
_CACHE = 1 << 30  # bytes of keys and values: some short prompts, on any device beside other work
_FREE = 0.05  # of a device's memory, that vLLM wants to see free before it starts


class VllmError(DoraExportError, ValueError):
    """vLLM refused the model or the adapter."""


@dataclass(frozen=True)
class Answer:
    """`logprobs`: after every prompt token, token id → log-probability of the likeliest to come.
    `tokens`: what follows the prompt, greedily."""

    logprobs: list[dict[int, float]]
    tokens: list[int]


def precision(base: BaseModel) -> str:
    """What vLLM computes a base with adapters in: float32, or 16 bits where its kernels take no
    float32: those for adapters on a GPU, and those for many quantized weights."""
    if find_spec("vllm") is None:
        return "float32"
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )
    from vllm.platforms import current_platform

    taken = list(current_platform.supported_dtypes)
    if not current_platform.is_cpu():
        taken = [dtype for dtype in taken if dtype != torch.float32]
    said = base.config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method in QUANTIZATION_METHODS:
        weights = get_quantization_config(method).get_supported_act_dtypes()
        taken = [dtype for dtype in weights if dtype in taken] or weights
    wanted = [dtype for dtype in (torch.float32, base.dtype()) if dtype in taken] or taken
    return str(wanted[0]).removeprefix("torch.")


class Vllm:
    """A model folder in vLLM. `lora`: its settings for adapters, None for none. `labels`: of a
    classifier. `dtype`: what it computes in.

    Raises `MissingError` when vLLM is not installed beside this package, `VllmError` when it does
    not take the model.
    """

    def __init__(
        self,
        model: Path,
        length: int,
        lora: dict[str, Any] | None = None,
        labels: int = 0,
        dtype: str = "float32",
    ) -> None:
        self._model = model
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Else its attention in float32 has products of 19 bits, on a GPU.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        try:
            from vllm import LLM
        except ImportError:
            raise MissingError(
                "vLLM is not installed in this environment",
                expected="vllm",
                remedy="install dora-serve beside vLLM and verify there (see docs/vllm.md)",
            ) from None
        settings = {} if lora is None else {"enable_lora": True, **lora}
        if labels:
            settings |= {"runner": "pooling", "convert": "classify"}
        try:
            self._llm = LLM(
                str(model),
                dtype=dtype,
                max_model_len=length,
                max_logprobs=TOP,
                enforce_eager=True,
                kv_cache_memory_bytes=_CACHE,
                gpu_memory_utilization=_FREE,
                disable_log_stats=True,
                distributed_executor_backend="uni",
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                **settings,
            )
        except Exception as error:
            raise VllmError("vLLM does not load this model", file=model, found=error) from error

    def complete(
        self, rows: Sequence[Sequence[int]], tokens: int, adapter: Path | None
    ) -> list[Answer]:
        """Answer every row of token ids with `tokens` further ones, by the adapter."""
        from vllm import SamplingParams

        # Every prefix is a prompt of its own: the log-probabilities of whole prompts that vLLM
        # offers fail on the CPU when the head has room for an adapter.
        ends = [(row, end) for row in rows for end in range(1, len(row) + 1)]
        asked = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens if end == len(row) else 1,
                ignore_eos=True,
                logprobs=TOP,
                detokenize=False,
            )
            for row, end in ends
        ]
        prefixes = [row[:end] for row, end in ends]
        done = iter(self._run(self._llm.generate, prefixes, adapter, sampling_params=asked))
        answers = []
        for row in rows:
            outputs = [next(done).outputs[0] for _ in row]
            likeliest = [{i: p.logprob for i, p in o.logprobs[0].items()} for o in outputs]
            answers.append(Answer(likeliest, list(outputs[-1].token_ids)))
        return answers

    def classify(self, rows: Sequence[Sequence[int]], adapter: Path | None) -> list[list[float]]:
        """The logits of a classification model for every row of token ids."""
        from vllm import PoolingParams

        asked = PoolingParams(task="classify", use_activation=False)
        done = self._run(self._llm.classify, rows, adapter, pooling_params=asked)
        return [list(each.outputs.probs) for each in done]

    def _run(self, verb: Any, rows: Any, adapter: Path | None, **settings: Any) -> Any:
        from vllm import TokensPrompt
        from vllm.lora.request import LoRARequest

        request = None if adapter is None else LoRARequest("adapter", 1, str(adapter.resolve()))
        prompts = [TokensPrompt(prompt_token_ids=list(row)) for row in rows]
        try:
            if request is not None:
                self._llm.llm_engine.add_lora(request)  # a step that fails leaves requests behind
            return verb(prompts, lora_request=request, use_tqdm=False, **settings)
        except Exception as error:
            message = "vLLM does not answer" if adapter is None else "vLLM refuses the adapter"
            raise VllmError(message, file=adapter or self._model, found=repr(error)) from error

    def close(self) -> None:
        """Give the memory back, so that another model may be loaded in this process."""
        # Now, not when the last reference goes: it would take the next model's groups along.
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
