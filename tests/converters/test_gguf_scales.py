"""Adapters in GGUF: their scales and orders of rows against float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.errors import DoraExportError, TargetError
from dora_serve import write_adapter
from tests.converters.lora_folder.llama import (
    DOWN1,
    K0,
    Q0,
    UP0,
    V0,
    errors,
    make_run,
)
from tests.converters.made import delta_of


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    result: np.ndarray = pairs.swapaxes(1, 2).reshape(rows.shape)
    return result


def gguf_of(folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    import gguf

    reader = gguf.GGUFReader(folder / f"{folder.name}.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return alpha, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gguf_scales_each_module_by_alpha_over_its_rank(
    tmp_path: Path, llama_base: Path, dtype: torch.dtype
) -> None:
    run = make_run(tmp_path / "run", {V0: 3, DOWN1: 1, UP0: 0, Q0: 2, K0: 2})
    write_adapter(run, tmp_path / "out", base=llama_base, target="gguf", dtype=dtype)
    alpha, tensors = gguf_of(tmp_path / "out")
    places = {V0: "blk.0.attn_v", DOWN1: "blk.1.ffn_down", Q0: "blk.0.attn_q", K0: "blk.0.attn_k"}
    assert {name.rpartition(".lora_")[0] for name in tensors} == {
        f"{place}.weight" for place in places.values()
    }
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for module, place in places.items():
        a, b = (tensors[f"{place}.weight.lora_{side}"].astype(np.float64) for side in "ab")
        expected = delta_of(run.updates[module])
        if module in (Q0, K0):
            heads = 4 if module == Q0 else 2
            expected = permuted(expected, heads)
        found = alpha / len(a) * b @ a
        gap = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert gap < bound
        assert errors(tmp_path / "out")[module] == pytest.approx(gap, abs=2e-6, rel=1e-2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card and "--lora out.gguf" in card


def test_gguf_needs_what_the_base_says(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 2, K0: 1})
    with pytest.raises(TargetError, match="architecture"):
        write_adapter(run, tmp_path / "out", target="gguf")
    config = json.loads((llama_base / "config.json").read_text())
    weights = (llama_base / "model.safetensors").read_bytes()
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(weights)
    count = len(load_file(base / "model.safetensors"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"architectures": None}, "unknown"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"num_hidden_layers": count + 1}, "more layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_attention_heads": 32}, "32 heads"),
        ({"num_key_value_heads": 16}, "16 heads"),
        ({"num_attention_heads": -4}, "cannot make this model"),
    ]
    for change, says in cases:
        (base / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DoraExportError, match=says):
            write_adapter(run, tmp_path / "out", base=base, target="gguf")
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    write_adapter(run, tmp_path / "out", base=base, target="gguf")
    (base / "config.json").write_text(json.dumps({**config, "num_key_value_heads": None}))
    fits = make_run(tmp_path / "run", {K0: 1})
    write_adapter(fits, tmp_path / "out2", base=base, target="gguf")
    alpha, tensors = gguf_of(tmp_path / "out2")
    a, b = (tensors[f"blk.0.attn_k.weight.lora_{side}"].astype(np.float64) for side in "ab")
    assert np.allclose(alpha * b @ a, permuted(delta_of(fits.updates[K0]), 4), atol=1e-5)
