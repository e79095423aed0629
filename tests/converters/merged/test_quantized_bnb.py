"""Merging into a base that bitsandbytes quantized: what the library itself dequantizes is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converters.errors import BaseError, RunError
from converters.model.base import open_base
from converters.readers import ReadOptions
from dora_serve import merge, read_run, write_adapter
from tests.converters.made import WEIGHTS
from tests.converters.quantized import (
    adapter,
    changed_base,
    fails_on,
    live_logits,
    merged_logits,
    plain_base,
    prove,
    proving,
)

pytest.importorskip("bitsandbytes")
KINDS: dict[str, dict[str, Any]] = {
    "nf4, scales quantized": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4, stored as bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "8 bits": {"load_in_8bit": True},
}
DOWN = "model.layers.0.mlp.down_proj"
SCALES = {"nf4": f"{DOWN}.weight.absmax", "8 bits": f"{DOWN}.SCB"}


def quantized(plain: Path, folder: Path, kind: str) -> Path:
    config = transformers.BitsAndBytesConfig(**KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return folder


def dequantized(base: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.dequantize(torch.float32)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return adapter(plain_base(tmp_path / "plain"), tmp_path / "run")


@pytest.mark.parametrize("kind", proving(KINDS, "bitsandbytes"))
def test_what_was_trained(kind: str, run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", kind)
    prove(run, base, tmp_path / "out", dequantized(base), "transformers (bitsandbytes)")
    difference = live_logits(base, run) - merged_logits(tmp_path / "out" / "float32")
    assert float(difference.abs().max()) < 2e-6
    plain = live_logits(tmp_path / "plain", run) - merged_logits(tmp_path / "out" / "float32")
    assert float(plain.abs().max()) > 1e-3  # of the base before it was quantized it is not


def test_the_layers_of_the_library(run: Path, tmp_path: Path) -> None:
    """PEFT on bitsandbytes' own layers, nothing dequantized beforehand; on some processors they
    compute in bfloat16."""
    base = quantized(tmp_path / "plain", tmp_path / "base", "nf4")
    merge(run, tmp_path / "out", base=base, dtype="float32")
    live = live_logits(base, run, dequantize=False)
    assert float((live - merged_logits(tmp_path / "out")).abs().max()) < 1e-2
    assert float((live - merged_logits(tmp_path / "plain")).abs().max()) > 1e-1


def test_a_start_that_quantizes_the_rest_anew(run: Path, tmp_path: Path) -> None:
    """PEFT takes OLoRA's start out of the dequantized weights and quantizes what is left: another
    base than the one that the files hold."""
    base = quantized(tmp_path / "plain", tmp_path / "base", "nf4")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "olora"}))
    assert read_run(run, ReadOptions(base=tmp_path / "plain")).updates
    with pytest.raises(RunError, match="quantizes anew"):
        read_run(run, ReadOptions(base=base))


@pytest.mark.parametrize("kind", SCALES)
def test_another_scale_is_another_base(kind: str, run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", kind)
    scale = load_file(base / WEIGHTS)[SCALES[kind]]
    other = changed_base(base, tmp_path / "other", SCALES[kind], scale * 1.5)
    merge(run, tmp_path / "out", base=base, dtype="float32")
    fails_on(run, tmp_path / "out", other)


def test_blocks_across_rows(tmp_path: Path) -> None:
    """Rows of 48 and blocks of 64: bitsandbytes' own kernel for the CPU is wrong there, and its
    plain implementation is not."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import QuantState

    plain = plain_base(tmp_path / "plain", hidden_size=32, intermediate_size=48)
    base = quantized(plain, tmp_path / "base", "nf4, scales quantized")
    stored, opened = load_file(base / WEIGHTS), open_base(base)
    parts = {n.removeprefix(f"{DOWN}."): t for n, t in stored.items() if n.startswith(DOWN)}
    packed = parts.pop("weight")
    state = QuantState.from_dict(parts, torch.device("cpu"))
    outer = state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    scales = state.state2.code[state.absmax.long()] * outer + state.offset
    with torch.compiler.set_stance("force_eager"):
        expected = _dequantize_4bit_compute(
            packed.flatten(), scales, state.code, 64, state.shape, state.dtype
        )
    assert torch.equal(opened.tensors[f"{DOWN}.weight"].load(), expected.float())
    flat, buffer = expected.flatten().float(), torch.empty(100)
    opened.tensors[f"{DOWN}.weight"].read_into(buffer, 77)
    assert torch.equal(buffer, flat[77:177])
    run = adapter(plain, tmp_path / "run")
    truth = {n: t.load().float() for n, t in opened.tensors.items()}
    found = prove(run, base, tmp_path / "out", truth, "this tool")
    assert "whole blocks" in str(found.dequantized)


def test_conv1d_keeps_its_orientation(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=80, n_positions=32)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    run = adapter(tmp_path / "plain", tmp_path / "run", ["c_attn", "c_proj"], fan_in_fan_out=True)
    base = quantized(tmp_path / "plain", tmp_path / "base", "nf4")
    merge(run, tmp_path / "out", base=base, dtype="float32")
    difference = live_logits(base, run) - merged_logits(tmp_path / "out")
    assert float(difference.abs().max()) < 2e-6
    stored, plain = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "plain"))
    assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in plain.items()}


def test_the_base_before_it_was_quantized_is_another_model(run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", "nf4")
    told = json.loads((run / "adapter_config.json").read_text())

    def warnings(named: str) -> str:
        (run / "adapter_config.json").write_text(
            json.dumps({**told, "base_model_name_or_path": named})
        )
        plan = merge(run, tmp_path / "out", base=tmp_path / "plain", force=True).plan
        return " ".join(plan.warnings)

    said = warnings(str(base))
    assert "it is another model" in said and "% apart" in said
    said = warnings("someone/Tiny-bnb-4bit")
    assert "it is another model" in said and "apart" not in said
    assert "another model" not in warnings("someone/Tiny-4B-Instruct")


def test_a_damaged_base_takes_an_adapter_and_no_merge(run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", "nf4")
    tensors = load_file(base / WEIGHTS)
    name = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
    save_file({**tensors, name: torch.zeros(8, dtype=torch.uint8)}, base / WEIGHTS)
    with pytest.raises(BaseError, match="cannot be read") as caught:
        merge(run, tmp_path / "out", base=base)
    assert caught.value.tensor == name and not (tmp_path / "out").exists()
    write_adapter(run, tmp_path / "adapter", base=base, target="vllm")
    assert open_base(base).dtype() == torch.bfloat16


def test_numbers_in_the_order_of_tiles(run: Path, tmp_path: Path) -> None:
    """As old versions of the library saved them from a GPU."""
    base = quantized(tmp_path / "plain", tmp_path / "base", "8 bits")
    name = f"{DOWN}.weight_format"
    other = changed_base(base, tmp_path / "other", name, torch.tensor(2, dtype=torch.uint8))
    with pytest.raises(BaseError, match="not of its format"):
        merge(run, tmp_path / "out", base=other)
