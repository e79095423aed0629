"""Names in vLLM itself: lint says of a file as it lies there exactly what vLLM does with it, and an
adapter written for vLLM computes whatever the run called its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from converters.lint import lint
from converters.model.base import open_base
from dora_serve import read_run, write_adapter
from tests.conftest import MODELS
from tests.converters.naming import FAMILIES, OTHERS, WRAPPED, load, make, renamed, stranger
from tests.converters.test_naming import AS_IT_LIES

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

BOUND = 1e-4
HEADS_OF_32 = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
PROMPT = [7, 23, 41, 5, 66, 12, 30, 9]
FORMS: dict[str, Callable[[str], str]] = {"PEFT": str, **WRAPPED, **OTHERS, "another": stranger}
# Family → the forms that vLLM computes as the file lies there.
COMPUTES = {
    "qwen2": {"PEFT", "PEFT's prefix twice", "no prefix"},
    "qwen2, embedding": {"PEFT", "PEFT's prefix twice", "no prefix", "body twice"},
}


class Engine:
    """One base in vLLM, asked with an adapter and without."""

    def __init__(self, folder: Path, family: str, **changes: object) -> None:
        from vllm import LLM

        self.family, self.folder, self.count = family, folder, 0
        make(folder, FAMILIES[family], **{**HEADS_OF_32, **changes})
        self._pools = FAMILIES[family].task == "FEATURE_EXTRACTION"
        settings: dict[str, Any] = {"skip_tokenizer_init": True}
        if self._pools:  # vLLM asks for a tokenizer there, though the prompts are tokens
            tokenizer = str(MODELS / "tiny-llama-base")
            settings = {"runner": "pooling", "convert": "embed", "tokenizer": tokenizer}
        self.llm = LLM(
            str(folder / "base"),
            dtype="float32",
            max_model_len=32,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 28,
            disable_log_stats=True,
            distributed_executor_backend="uni",
            enable_prefix_caching=False,
            enable_lora=True,
            max_lora_rank=8,
            **settings,
        )

    def ask(self, lora: Path) -> torch.Tensor:
        """The embedding of the prompt, or the log-probabilities of what follows it."""
        from vllm import PoolingParams, SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        self.count += 1
        request = LoRARequest(f"adapter-{self.count}", self.count, str(lora.resolve()))
        # Refused here, nothing is left behind; refused by a step, a request is left that no step
        # can end.
        self.llm.llm_engine.add_lora(request)
        prompt = [TokensPrompt(prompt_token_ids=PROMPT)]
        if self._pools:
            asked = PoolingParams(use_activation=False)
            (told,) = self.llm.embed(
                prompt, pooling_params=asked, lora_request=request, use_tqdm=False
            )
            return torch.tensor(told.outputs.embedding)
        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=20, detokenize=False)
        (done,) = self.llm.generate(prompt, sampling, lora_request=request, use_tqdm=False)
        row = torch.full((80,), -torch.inf)
        for token, entry in done.outputs[0].logprobs[0].items():
            row[token] = entry.logprob
        return row

    def truth(self, lora: Path | None) -> torch.Tensor:
        """What PEFT's live model answers, or the base alone."""
        model: Any = load(FAMILIES[self.family], self.folder / "base")
        if lora is not None:
            model = PeftModel.from_pretrained(model, str(lora)).eval()
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([PROMPT]))
        if self._pools:
            return torch.as_tensor(found.last_hidden_state[0, -1].float())
        return torch.log_softmax(found.logits[0, -1].float(), dim=-1)

    def computes(self, lora: Path, truth: torch.Tensor) -> bool:
        try:
            found = self.ask(lora)
        except Exception:
            return False
        known = torch.isfinite(found)
        return float((found - truth)[known].abs().max()) <= BOUND


def _marks(family: str) -> list[pytest.MarkDecorator]:
    return [
        pytest.mark.named(
            family=family,
            form=form,
            computes=("vllm",) if form in COMPUTES[family] else (),
            asked=("vllm",),
        )
        for form in AS_IT_LIES[family]
    ]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=_marks(name)) for name in COMPUTES]
)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    made = Engine(tmp_path_factory.mktemp("names"), request.param)
    yield made
    made.llm.llm_engine.engine_core.shutdown()
    patch.undo()


def test_lint_says_what_vllm_computes(engine: Engine, tmp_path: Path) -> None:
    clean, base = engine.folder / "lora", engine.folder / "base"
    truth, plain = engine.truth(clean), engine.truth(None)
    assert float((truth - plain).abs().max()) > 100 * BOUND
    computes, told = set(), set()
    for number, (form, change) in enumerate(FORMS.items()):
        lora = renamed(clean, tmp_path / str(number), change)
        found = lint(lora, open_base(base), ["vllm"])
        told |= set() if any(f.severity == "error" for f in found) else {form}
        computes |= {form} if engine.computes(lora, truth) else set()
    same = {form for form, change in FORMS.items() if _unchanged(clean, change)}
    assert told - same == computes - same == COMPUTES[engine.family] - same
    assert same <= told and same <= computes


def _unchanged(lora: Path, change: Callable[[str], str]) -> bool:
    from safetensors import safe_open

    with safe_open(lora / "adapter_model.safetensors", "pt") as file:
        return all(change(key) == key for key in file.keys())  # noqa: SIM118


def test_what_is_written_for_vllm_computes(engine: Engine, tmp_path: Path) -> None:
    clean, base = engine.folder / "lora", engine.folder / "base"
    truth = engine.truth(clean)
    for number, (form, change) in enumerate({**WRAPPED, **OTHERS}.items()):
        lora = renamed(clean, tmp_path / f"lora-{number}", change)
        write_adapter(read_run(lora), tmp_path / f"out-{number}", base=base, target="vllm")
        assert engine.computes(tmp_path / f"out-{number}", truth), form
