"""Decoders in ONNX Runtime at lengths on both sides of every border that a configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.errors import DoraExportError
from converters.model.base import open_base
from converters.targets.onnx import write_onnx
from converters.targets.onnx.lengths import windows_of
from dora_serve import api, read_run
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.sampling import Sampling
from tests.conftest import MODELS, made_once
from tests.converters.families import DECODER
from tests.engines.decoders import BOUND, Case, greedy
from tests.engines.test_continuous import Answer, file, running
from tests.engines.test_onnx_families import lora

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 84,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]


def test_a_context_beyond_all_memory_is_refused() -> None:
    config = transformers.LlamaConfig(**{**SHAPE, "max_position_embeddings": 10**12})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(DoraExportError, match="so long a context"):
        windows_of(model, torch.ones(1, 4, dtype=torch.int64))


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


@dataclass(frozen=True)
class Kind:
    """A configuration, and the same without what happens at `border` tokens."""

    config: str
    values: dict[str, Any]
    without: dict[str, Any]
    border: int = 24

    def make(self, dropped: bool = False) -> Any:
        values = {**SHAPE, **self.values, **(self.without if dropped else {})}
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**values)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


WINDOW = {"sliding_window": 24}
NONE = {"sliding_window": 96}
HEADS = {"head_dim": 16}
LONGROPE = {
    **rope("longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=24),
    "original_max_position_embeddings": 24,
    "sliding_window": None,
}
BEYOND = {
    **rope("longrope", short_factor=SHORT, long_factor=SHORT, original_max_position_embeddings=24)
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
KINDS = {
    "mistral": Kind("MistralConfig", WINDOW, NONE),
    "phi3": Kind("Phi3Config", {**WINDOW, "original_max_position_embeddings": 96}, NONE),
    "phi3-longrope": Kind("Phi3Config", LONGROPE, BEYOND),
    "gemma2": Kind("Gemma2Config", {**HEADS, **WINDOW, "query_pre_attn_scalar": 16}, NONE),
    "gemma3": Kind(
        "Gemma3TextConfig",
        {**HEADS, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        NONE,
    ),
    "qwen2": Kind(
        "Qwen2Config", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}, NONE
    ),
    "starcoder2": Kind("Starcoder2Config", WINDOW, NONE),
    "cohere2": Kind(
        "Cohere2Config",
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 1.0},
        NONE,
    ),
    "yarn": Kind(
        "Qwen2Config",
        rope("yarn", factor=4.0, original_max_position_embeddings=24),
        rope("default"),
    ),
    "llama3": Kind("LlamaConfig", rope("llama3", factor=8.0, **LLAMA3), rope("default")),
    "linear": Kind("Qwen2Config", rope("linear", factor=4.0), rope("default")),
    "llama, linear": Kind("LlamaConfig", rope("linear", factor=4.0), rope("default")),
    "dynamic": Kind("Qwen2Config", rope("dynamic", factor=4.0), rope("linear", factor=4.0)),
    "smollm3": Kind("SmolLM3Config", {"no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 1]}),
}
PLAIN = ("phi3-longrope",)  # of the others the plain run has no time for
# What is dropped tells at once.
EVERYWHERE = ("yarn", "llama3", "linear", "llama, linear", "dynamic", "smollm3")


def logits(model: Any, row: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([row])).logits[0]
    return found


def off(found: Any, truth: torch.Tensor) -> float:
    return float((torch.from_numpy(np.asarray(found)) - truth).abs().max())


def exported(name: str, factory: pytest.TempPathFactory) -> Case:
    """The kind's model with two adapters as ONNX, made once for all files."""

    def make(root: Path) -> None:
        KINDS[name].make().save_pretrained(root / "base")
        AutoTokenizer.from_pretrained(MODELS / "tiny-llama-base").save_pretrained(root / "base")
        targets = {"target_modules": "all-linear"}
        runs = {run: lora(AutoModelForCausalLM, root, run, **targets) for run in ("one", "two")}
        write_onnx(open_base(root / "base"), root / "onnx", adapters=runs)

    root = made_once(factory, f"exported-{name}", make)
    runs = {run: read_run(root / run) for run in ("one", "two")}
    return Case(root / "onnx", root / "base", runs)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in PLAIN else pytest.mark.further) for n in KINDS]
)
def test_every_length(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kind, case = KINDS[name], exported(name, tmp_path_factory)
    model, dropped = kind.make(), kind.make(dropped=True)
    dropped.load_state_dict(model.state_dict())
    tuned = AutoModelForCausalLM.from_pretrained(case.base, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(tuned.eval(), str(case.runs["one"].path)).eval()
    models = {None: model, "one": tuned}

    border = kind.border
    lengths = (3, border - 1, border, border + 1, border + 2, 60, 91)
    rows = [[(7 * i * i + n) % 80 + 3 for i in range(n)] for n in lengths]
    truths = {adapter: [logits(each, row) for row in rows] for adapter, each in models.items()}
    bound = BOUND * max(1.0, *(float(t.abs().max()) for t in truths["one"]))
    for row, truth in zip(rows, truths[None], strict=True):  # the control
        told = len(row) > border or name in EVERYWHERE
        assert (off(logits(dropped, row), truth) > 20 * bound) == told, len(row)

    decoder = Decoder(case.folder, threads=1)
    mixed: list[str | None] = ["one" if i % 2 else None for i in range(len(rows))]
    wanted = [truths[adapter][i] for i, adapter in enumerate(mixed)]
    together = decoder.batch(rows, mixed).prefill_all()
    for i, (row, truth) in enumerate(zip(rows, wanted, strict=True)):
        assert off(decoder.batch([row], mixed[i]).prefill_all()[0], truth) <= bound, len(row)
        assert off(together[i, : len(row)], truth) <= bound, len(row)

    steps = Sampling(max_tokens=5, ignore_eos=True)
    wishes = [(row, mixed[i]) for i, row in enumerate(rows)]
    answers = [greedy(models[adapter], row, 5) for row, adapter in wishes]
    alone = [decoder.generate([row], adapter, steps)[0].tokens for row, adapter in wishes]
    assert alone == answers
    assert [done.tokens for done in decoder.generate(rows, mixed, steps)] == answers
    with running(case, max_rows=4, piece=10) as engine:
        waiting = [Answer() for _ in wishes]
        for (row, adapter), answer in zip(wishes, waiting, strict=True):
            engine.submit(row, file(case, adapter), [steps], [answer.updates.put])
        assert [answer.wait()[0] for answer in waiting] == answers


@pytest.mark.parametrize("name", KINDS)
def test_windows_are_what_the_masks_say(name: str) -> None:
    kind = KINDS[name]
    found = windows_of(kind.make(), torch.tensor([[5, 6, 7]]))
    assert found.keys() == {0, 1}
    windowed = "sliding_window" in kind.without
    assert (24 in found.values()) == windowed
    assert windows_of(kind.make(dropped=True), torch.tensor([[5, 6, 7]])) == {0: None, 1: None}


def test_attention_that_is_no_window_is_refused() -> None:
    chunks = transformers.Llama4TextConfig(
        **{**SHAPE, **HEADS, "intermediate_size_mlp": 96},
        attention_chunk_size=24,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(chunks).eval()
    with pytest.raises(DoraExportError, match="no ONNX export for this model's attention"):
        windows_of(model, torch.tensor([[5, 6, 7]]))


@pytest.mark.further
def test_a_graph_that_lacks_outputs_is_refused(tmp_path: Path) -> None:
    """Of GPT-Neo torch's exporter writes the logits alone."""
    config = transformers.GPTNeoConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        vocab_size=80,
        max_position_embeddings=40,
        attention_types=[[["local"], 1]],
        window_size=8,
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(DoraExportError, match="torch cannot export") as error:
        api.write_onnx(tmp_path / "base", tmp_path / "onnx", adapters={})
    assert "of 3 outputs" in str(error.value)


def test_a_class_that_gives_the_mask_by_name() -> None:
    """Trinity's (AFMoE) ended in a traceback."""
    sizes = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.AfmoeConfig(**DECODER, **sizes, **experts, head_dim=8)
    model = transformers.AfmoeForCausalLM(config).eval()
    assert windows_of(model, torch.tensor([[5, 6, 7]])) == {0: 6, 1: None}
