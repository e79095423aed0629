"""Damaged and hostile tensor files: each ends in an error that names file and tensor."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from converters.errors import DoraExportError, TensorFileError
from converters.files.tensors import load_finite, open_file, open_safetensors, same_values


def write_raw(path: Path, header: object, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_wrote_in_every_dtype(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    } | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    read = open_safetensors(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read[name].load(), tensor)
        assert read[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry("F32", [2], 0, 4)}, b"1234", "size does not match its shape"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, b"123456", "overlaps"),
        ({"a": entry("F32", [1], 4, 8)}, b"12345678", "gap"),
        ({"a": entry("F32", [1], 0, 4)}, b"12", "file size"),
        ({"a": entry("F99", [1], 0, 4)}, b"1234", "unknown dtype"),
        ({"a": entry("F32", [-1], 0, 4)}, b"1234", "malformed"),
        ({"a": entry("F32", [1 << 40], 0, 4 << 40)}, b"1234", "malformed"),
        ({"a": {"dtype": "F32"}}, b"", "malformed"),
        (b'{"a": 1, "a": 2}', b"", "appears twice"),
        (b"[1, 2]", b"", "not an object"),
        (b"{nonsense", b"", "not valid JSON"),
    ],
)
def test_lying_headers(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(TensorFileError, match=says) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)


def test_header_length_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(TensorFileError, match="beyond the end"):
        open_safetensors(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(200))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, garbage, empty])
@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_damaged_files(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = tmp_path / name
    if name.endswith("bin"):
        torch.save({"a": torch.ones(1000)}, path)
    else:
        save_file({"a": torch.ones(1000)}, path)
    damage(path)
    with pytest.raises(TensorFileError) as caught:
        open_file(path)
    assert str(path) in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(TensorFileError, match="more than tensors"):
        open_file(tmp_path / "x.bin")
    assert not (tmp_path / "executed").exists()


def test_a_state_dict_of_other_things(tmp_path: Path) -> None:
    torch.save({"a": 3}, tmp_path / "x.bin")
    with pytest.raises(TensorFileError, match="not a plain tensor"):
        open_file(tmp_path / "x.bin")


def test_a_shard_of_a_tensor_is_none(tmp_path: Path) -> None:
    """As each process of a training by FSDP saves its own."""
    place = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
        torch.save({"a": shard}, tmp_path / "x.bin")
        with pytest.raises(TensorFileError, match="not a plain tensor"):
            open_file(tmp_path / "x.bin")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_found(tmp_path: Path, value: float) -> None:
    save_file({"a": torch.tensor([1.0, value])}, tmp_path / "x.safetensors")
    with pytest.raises(DoraExportError, match="NaN or infinity"):
        load_finite(open_file(tmp_path / "x.safetensors")["a"])


def test_same_values_compares_at_the_coarser_dtype(tmp_path: Path) -> None:
    data = torch.randn(3, 5)
    save_file({"a": data, "b": data.bfloat16(), "c": data + 1}, tmp_path / "x.safetensors")
    read = open_file(tmp_path / "x.safetensors")
    assert same_values(read["a"], read["b"])
    assert not same_values(read["a"], read["c"])


@pytest.mark.parametrize("coarse", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3 << 20), st.data())
def test_same_values_in_any_block(coarse: torch.dtype, count: int, data: st.DataObject) -> None:
    """Also beyond the first of the blocks in which tensors are compared."""
    place = data.draw(st.integers(0, count - 1))
    left = torch.zeros(count)
    right = left.clone()
    right[place] = 1
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        tensors = {"a": left, "b": right, "c": left.to(coarse).clone()}
        tensors["d"] = right.to(coarse).clone()
        save_file(tensors, path)
        read = open_file(path)
        assert same_values(read["a"], read["c"]) and same_values(read["d"], read["b"])
        assert not same_values(read["a"], read["d"])
        assert not same_values(read["c"], read["b"])
