"""`verify` of merged models whose tensors are of several dtypes, or whose run was of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from tests.conftest import DATA
from tests.converters.families import DECODER
from tests.converters.test_peft_kinds import FILE, saved, trained

REFERENCE = DATA / "reference"
NAME = "LlamaForCausalLM"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def stored(folder: Path) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in load_file(folder / "model.safetensors").items()}


def spoilt(merged: Path) -> None:
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 1.1
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("kept", [F32, BF16, "mixed"], ids=str)
def test_a_whole_head(tmp_path: Path, kept: torch.dtype | str, dtype: torch.dtype) -> None:
    """A base in `kept`, a run saved in `dtype`: what the run brings keeps its own."""
    base = saved(NAME, "LlamaConfig", DECODER, tmp_path / "base")
    file = base / "model.safetensors"
    narrow = kept if isinstance(kept, torch.dtype) else BF16
    wide = "model.layers.0" if kept == "mixed" else "nothing"
    tensors = {n: t if wide in n else t.to(narrow) for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    whole: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    trained(NAME, base, tmp_path / "run", **whole)
    file = tmp_path / "run" / FILE
    save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, {"format": "pt"})
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    assert stored(tmp_path / "merged") == {**stored(base), "lm_head.weight": dtype}
    found = verify(run, tmp_path / "merged", base=base)
    assert found.passed
    assert found.truth == "peft"
    spoilt(tmp_path / "merged")
    wrong = verify(run, tmp_path / "merged", base=base)
    assert not wrong.passed
    assert wrong.max_abs > 10 * wrong.tolerance


def test_a_rounded_copy_of_what_the_base_holds_was_not_trained(tmp_path: Path) -> None:
    """PEFT saves an embedding beside the adapter on it, in the adapter's dtype."""
    base = saved(NAME, "LlamaConfig", DECODER, tmp_path / "base")
    file, embedding = base / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    tensors[embedding] = torch.randn(tensors[embedding].shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    trained(NAME, base, tmp_path / "run", target_modules=["q_proj", "embed_tokens"])
    file = tmp_path / "run" / FILE
    save_file({n: t.to(BF16) for n, t in load_file(file).items()}, file, {"format": "pt"})
    assert any(name.endswith("embed_tokens.base_layer.weight") for name in load_file(file))
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    write_adapter(run, tmp_path / "adapter", base=base)
    for artifact in ("merged", "adapter"):
        found = verify(run, tmp_path / artifact, base=base)
        assert found.passed
        assert found.truth == "peft"
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors[embedding] = tensors[embedding].to(BF16).float()
    save_file(tensors, file, {"format": "pt"})
    assert not verify(run, tmp_path / "merged", base=base).passed


def test_a_narrow_adapter_that_decides_otherwise_between_equals(tmp_path: Path) -> None:
    """Words in pairs, of which the run makes one likelier by less than bfloat16 can say."""
    base = saved(NAME, "LlamaConfig", DECODER, tmp_path / "base")
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][::2].repeat_interleave(2, dim=0)
    save_file(tensors, file, {"format": "pt"})
    trained(NAME, base, tmp_path / "run", target_modules=["lm_head"])
    file = tmp_path / "run" / FILE
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name][1::2] = tensors[name][::2] * 1.001
    save_file(tensors, file, {"format": "pt"})
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    write_adapter(run, tmp_path / "adapter", base=base, dtype=BF16)
    found = verify(run, tmp_path / "adapter", base=base)
    assert 0 < found.max_abs < found.tolerance / 4
    assert found.passed
    file = tmp_path / "adapter" / FILE
    save_file({n: t * 1.1 for n, t in load_file(file).items()}, file, {"format": "pt"})
    assert not verify(run, tmp_path / "adapter", base=base).passed


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_checkpoint_whose_frozen_weights_are_the_bases_rounded(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """The whole model was saved in `dtype`, on a base in float32: the base's numbers are deployed,
    and the updates are of the factors as they were saved."""
    entry = next(
        e for e in json.loads((REFERENCE / "index.json").read_text()) if e["name"] == "roberta"
    )
    base, run = REFERENCE / entry["base"], tmp_path / "run/checkpoint"
    shutil.copytree(REFERENCE / entry["checkpoint"], run)
    tensors = {n: t.to(dtype) for n, t in load_file(run / "model.safetensors").items()}
    save_file(tensors, run / "model.safetensors", {"format": "pt"})
    read = read_run(run, ReadOptions(base=base, lora_alpha=8))
    merge(read, tmp_path / "merged", base=base)
    own, merged = load_file(base / "model.safetensors"), tmp_path / "merged"
    held = load_file(merged / "model.safetensors")
    for module in read.updates:
        a, b, c = (
            tensors[f"model.{module}.{part}"].double()
            for part in ("lora_a_linear.weight", "lora_b_linear.weight", "lora_scaler")
        )
        weight = own[f"{module}.weight"].double() + 8 / 6 * (b * c) @ a
        torch.testing.assert_close(held[f"{module}.weight"].double(), weight, atol=1e-6, rtol=1e-6)
    assert verify(read, merged, base=base).passed
    write_adapter(read, tmp_path / "adapter", base=base)
    assert verify(read, tmp_path / "adapter", base=base).passed
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    save_file({**held, name: held[name] * 1.1}, merged / "model.safetensors", {"format": "pt"})
    assert not verify(read, merged, base=base).passed
