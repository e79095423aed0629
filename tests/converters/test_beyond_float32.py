"""An update that float32 cannot hold is refused wherever it would go, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from converters.errors import BaseError, DoraExportError, TargetError
from converters.files.output import save_tensors
from converters.files.tensors import open_safetensors
from converters.model.base import open_base
from converters.run import Run
from converters.targets.onnx.adapters import write_adapter_file
from converters.updates.rank_one import RankOneSum, cut
from dora_serve import export, merge, write_adapter

Q = "model.layers.0.self_attn.q_proj"
Write = Callable[[Run, Path, Path], object]


def huge(size: float) -> RankOneSum:
    """Of finite factors, and a norm of `size`."""
    factor = (size / 32) ** 0.5
    return RankOneSum(torch.full((1, 32), factor), torch.ones(1), torch.full((32, 1), factor))


@dataclass(frozen=True)
class Site:
    name: str
    in_features: int = 32
    out_features: int = 32


def to_onnx(run: Run, _base: Path, out: Path) -> object:
    return write_adapter_file(out, run, {Q: Site(Q)})  # type: ignore[dict-item]


WRITES: dict[str, Write] = {
    "merged": lambda run, base, out: merge(run, out, base=base),
    "peft": lambda run, base, out: write_adapter(run, out, base=base),
    "vllm": lambda run, base, out: write_adapter(run, out, base=base, target="vllm"),
    "gguf": lambda run, base, out: export(run, out, "gguf", base=base),
    "fitted": lambda run, base, out: write_adapter(run, out, base=base, max_rank=1),
    "by energy": lambda run, base, out: write_adapter(run, out, base=base, energy=0.5),
    "by budget": lambda run, base, out: write_adapter(run, out, base=base, budget=64),
    "onnx": to_onnx,
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("size", [1e52, 4e38])
def test_a_norm_beyond_float32_is_refused(
    way: str, size: float, llama_base: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", "test", {Q: huge(size)}, task="causal-lm")
    run.path.mkdir()
    with pytest.raises((TargetError, BaseError), match="beyond the range of float32") as caught:
        WRITES[way](run, llama_base, tmp_path / "out")
    assert "‖ΔW‖ = " in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("way", WRITES)
def test_a_large_one_within_it_is_written(way: str, llama_base: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "test", {Q: huge(1e30)}, task="causal-lm")
    run.path.mkdir()
    WRITES[way](run, llama_base, tmp_path / "out")
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_factor_beyond_the_dtype_is_refused(dtype: str, llama_base: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "test", {Q: huge(1e12 if dtype == "float16" else 3.39e38)})
    run.path.mkdir()
    if dtype == "float16":
        with pytest.raises(DoraExportError, match="beyond the range"):
            write_adapter(run, tmp_path / "out", base=llama_base, dtype=dtype)
        assert not (tmp_path / "out").exists()
    else:
        write_adapter(run, tmp_path / "out", base=llama_base, dtype=dtype)


def test_a_whole_tensor_beyond_the_dtype_is_refused(llama_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "whole.safetensors"
    path.parent.mkdir()
    norm = torch.ones(open_base(llama_base).tensors["model.norm.weight"].shape)
    norm[0] = 1e5
    save_tensors({"model.norm.weight": norm}, path)
    run = Run(
        path.parent, "test", {Q: huge(1.0)}, replaced=open_safetensors(path), task="causal-lm"
    )
    with pytest.raises(TargetError, match="beyond the range of the adapter's dtype") as caught:
        write_adapter(run, tmp_path / "out", base=llama_base, dtype="float16")
    assert (caught.value.file, caught.value.tensor) == (path, "model.norm.weight")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    write_adapter(run, tmp_path / "out", base=llama_base, dtype="bfloat16")


def test_what_a_cut_leaves_is_checked() -> None:
    u = vh = torch.eye(2).double()
    s = torch.tensor([1e39, 1.0], dtype=torch.float64)
    with pytest.raises(TargetError, match="beyond the range of float32"):
        cut(u, s, vh, 1)
    assert cut(u, s / 10, vh, 2).rank == 2
    RankOneSum(torch.zeros(0, 2), torch.zeros(0), torch.zeros(2, 0)).check_range()
    with pytest.raises(TargetError, match=Q):
        huge(1e52).check_range(Q)
