"""What is read of a tensor, whatever file it lies in, and which tensors are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converters.errors import (
    BaseError,
    TensorFileError,
)
from converters.files.tensors import (
    blocks,
    is_copy_of,
    load_finite,
    open_file,
    open_files,
    refuse_quantized,
    rows_and_columns,
    same_values,
)
from tests.converters.files.dtypes import DTYPES, tensor_of


def test_the_suffix_says_which_kind_of_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    for name in ("x.bin", "x.pt", "x.pth"):
        torch.save({name: torch.ones(3)}, tmp_path / name)
        assert list(open_file(tmp_path / name)) == [name]
    found = open_files([tmp_path / "x.safetensors", tmp_path / "x.bin"])
    assert {name: t.path.name for name, t in found.items()} == {
        "a": "x.safetensors",
        "x.bin": "x.bin",
    }
    with pytest.raises(TensorFileError, match="two files") as caught:
        open_files([tmp_path / "x.bin", tmp_path / "x.safetensors", tmp_path / "x.bin"])
    assert caught.value.tensor == "x.bin"
    assert open_files([]) == {}


@pytest.mark.parametrize(
    ("shape", "matrix"), [((), (1, 1)), ((5,), (1, 5)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4)),
                          ((3, 0), (0, 0)), ((0, 3), (0, 3))], ids=str
)  # fmt: skip
def test_a_tensor_as_a_matrix(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert rows_and_columns(shape) == matrix


def test_only_floats_of_two_bytes_or_more_take_an_update(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({str(dtype): tensor_of(dtype, (2,)) for dtype in DTYPES}, path)
    found = open_file(path)
    assert len(found) == len(DTYPES)
    for name, tensor in found.items():
        if name in [str(dtype) for dtype in DTYPES[:4]]:
            refuse_quantized(tensor)
        else:
            with pytest.raises(BaseError, match="cannot take") as caught:
                refuse_quantized(tensor)
            assert (caught.value.file, caught.value.tensor) == (path, name)


def test_load_finite_gives_float32(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {str(d): tensor_of(d, (2, 3)) for d in DTYPES if d.is_floating_point}
    save_file({**tensors, "int": torch.arange(3)}, path)
    found = open_file(path)
    for name, tensor in tensors.items():
        data = load_finite(found[name])
        assert data.dtype == torch.float32
        assert torch.equal(data, tensor.float())
    with pytest.raises(TensorFileError, match="floating"):
        load_finite(found["int"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted(tmp_path: Path, value: float) -> None:
    save_file({"a": torch.tensor([value, 1.0, value])}, tmp_path / "x.safetensors")
    with pytest.raises(TensorFileError, match="NaN or infinity") as caught:
        load_finite(open_file(tmp_path / "x.safetensors")["a"])
    assert caught.value.found == "2 of 3 values"


@pytest.mark.parametrize("elements", [1, 3, 4, 12, 100])
def test_blocks_are_the_whole_in_order(tmp_path: Path, elements: int) -> None:
    save_file({"a": torch.arange(12.0).reshape(3, 4)}, tmp_path / "x.safetensors")
    pieces = [p.clone() for p in blocks(open_file(tmp_path / "x.safetensors")["a"], elements)]
    assert torch.equal(torch.cat(pieces), torch.arange(12.0))
    assert {len(piece) for piece in pieces[:-1]} <= {elements}
    save_file({"a": torch.ones(0)}, tmp_path / "y.safetensors")
    assert list(blocks(open_file(tmp_path / "y.safetensors")["a"])) == []


@pytest.mark.parametrize("at", [0, (1 << 20) - 1, 1 << 20, 1_199_999])
def test_values_are_compared_to_the_last(tmp_path: Path, at: int) -> None:
    one, other = torch.zeros(1200, 1000), torch.zeros(1200, 1000)
    other.view(-1)[at] = 1
    save_file({"a": one}, tmp_path / "a.safetensors")
    save_file({"b": other}, tmp_path / "b.safetensors")
    a, b = open_file(tmp_path / "a.safetensors")["a"], open_file(tmp_path / "b.safetensors")["b"]
    assert same_values(a, a) and is_copy_of(b, b)
    assert not same_values(a, b) and not is_copy_of(a, b)


def test_a_copy_may_be_coarser_and_not_finer_nor_of_another_shape(tmp_path: Path) -> None:
    data = torch.randn(3, 5)
    save_file(
        {"fine": data, "coarse": data.bfloat16(), "turned": data.reshape(5, 3).clone()},
        tmp_path / "x.safetensors",
    )
    found = open_file(tmp_path / "x.safetensors")
    assert is_copy_of(found["coarse"], found["fine"])
    assert not is_copy_of(found["fine"], found["coarse"])
    assert same_values(found["fine"], found["coarse"])
    assert same_values(found["coarse"], found["fine"])
    assert not is_copy_of(found["fine"], found["turned"])
    assert not same_values(found["turned"], found["fine"])
