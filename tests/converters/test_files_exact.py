"""Files against the libraries that define them: what is read, and what is refused, to the byte."""

from __future__ import annotations

import ctypes
import io
import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from converters.certificate import tool, write_certificate
from converters.errors import (
    BaseError,
    DoraExportError,
    MissingError,
    OutputError,
    RunError,
    TensorFileError,
)
from converters.files import onnx_files
from converters.files.handles import check_file, opened, reading, state_at, state_of, there
from converters.files.json_files import parse_json, read_json
from converters.files.onnx_files import (
    graphs_in,
    head_names,
    heads_in,
    is_onnx_folder,
    names,
    read_adapter_file,
)
from converters.files.output import (
    JOURNAL,
    addition,
    check_output,
    output_folder,
    save_tensors,
)
from converters.files.pickles import refuse_filling
from converters.files.tensors import (
    blocks,
    is_copy_of,
    load_finite,
    load_torch,
    nbytes,
    numel,
    open_file,
    open_files,
    open_safetensors,
    open_torch,
    refuse_quantized,
    rows_and_columns,
    same_values,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    own, other = (t.contiguous().view(-1).view(torch.uint8) for t in (left, right))
    return torch.equal(own, other)


def with_header(path: Path, entries: Mapping[str, object], data: bytes = b"") -> Path:
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- safetensors


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_as_the_library_reads_them(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": tensor_of(dtype, shape),
        "a": tensor_of(torch.float32, (3,)),
        "c": torch.ones(2),
    }
    save_file(tensors, path, {"format": "pt"})
    found = open_safetensors(path)
    expected = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        lazy = found[name]
        assert (lazy.name, lazy.path, lazy.dtype) == (name, path, tensor.dtype)
        assert lazy.shape == tuple(tensor.shape)
        assert same_bytes(lazy.load(), tensor)
        assert numel(lazy) == tensor.numel()
        assert nbytes(lazy) == tensor.numel() * tensor.element_size()


def test_tensors_come_in_the_order_of_the_file_not_of_the_header(tmp_path: Path) -> None:
    path = with_header(
        tmp_path / "x.safetensors",
        {"z": entry([1], 4, 8), "empty": entry([0], 4, 4), "a": entry([1], 0, 4)},
        struct.pack("<2f", 1, 2),
    )
    found = open_safetensors(path)
    assert list(found) == ["a", "empty", "z"]
    assert [found[name].load().tolist() for name in ("a", "z")] == [[1.0], [2.0]]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 11), st.integers(0, 12))
def test_any_part_is_read(start: int, count: int) -> None:
    path = Path(f"/tmp/part-{os.getpid()}.safetensors")
    whole = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    try:
        for name, write in (("x.safetensors", None), ("x.bin", torch.save)):
            own = path.with_name(f"{path.stem}-{name}")
            if write is None:
                own.write_bytes(save({"pad": torch.ones(3), "w": whole}))
            else:
                write({"w": whole.T.contiguous().T}, own)
            count = min(count, 12 - start)
            buffer = torch.full((count,), -1, dtype=torch.int16)
            open_file(own)["w"].read_into(buffer, start)
            assert buffer.tolist() == list(range(start, start + count))
            own.unlink()
    finally:
        path.unlink(missing_ok=True)


BAD_HEADERS: dict[str, tuple[Mapping[str, object], bytes, str]] = {
    "no data": ({"a": entry([1], 0, 4)}, b"", "file size"),
    "too much data": ({"a": entry([1], 0, 4)}, b"12345", "file size"),
    "gap first": ({"a": entry([1], 1, 5)}, b"12345", "gap"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678", "overlap"),
    "short": ({"a": entry([2], 0, 7)}, b"1234567", "size does not match"),
    "backwards": ({"a": entry([0], 4, 0)}, b"1234", "size does not match"),
    "negative begin": ({"a": entry([1], -4, 0)}, b"1234", "malformed"),
    "negative axis": ({"a": entry([-1, -1], 0, 4)}, b"1234", "malformed"),
    "true axis": ({"a": entry([True], 0, 4)}, b"1234", "malformed"),
    "fraction": ({"a": entry([1.0], 0, 4)}, b"1234", "malformed"),
    "offset of text": ({"a": entry([1], "0", 4)}, b"1234", "malformed"),
    "true offset": ({"a": entry([0], 0, False)}, b"", "malformed"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 2, 4]}}, b"", "malf"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234", "malformed"),
    "dtype": ({"a": entry([1], 0, 4, "F31")}, b"1234", "malformed"),
    "dtype of a list": ({"a": entry([1], 0, 4, ["F32"])}, b"1234", "malformed"),
    "17 axes": ({"a": entry([1] * 17, 0, 4)}, b"1234", "malformed"),
    "63 bits": ({"a": entry([0, *[100] * 15], 0, 0)}, b"x" * 100, "malformed"),
    "more rows than bytes": ({"a": entry([0, 1 << 30], 0, 0)}, b"", "malformed"),
    "an entry of text": ({"a": "F32"}, b"", "malformed"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    entries, data, says = BAD_HEADERS[case]
    path = with_header(tmp_path / "x.safetensors", entries, data)
    with pytest.raises(TensorFileError, match=says) as caught:
        open_safetensors(path)
    assert caught.value.file == path
    assert caught.value.remedy is not None


@pytest.mark.parametrize("case", ["size does not match", "gap", "malformed"])
def test_a_bad_header_names_its_tensor_and_what_was_found(tmp_path: Path, case: str) -> None:
    found = {
        "size does not match": entry([2], 4, 8),
        "gap": entry([1], 8, 12),
        "malformed": entry([1], 4, 8, "no"),
    }[case]
    path = with_header(tmp_path / "x.safetensors", {"ok": entry([1], 0, 4), "bad": found})
    with pytest.raises(TensorFileError, match=case) as caught:
        open_safetensors(path)
    assert caught.value.tensor == "bad"
    assert caught.value.found and caught.value.expected


def test_headers_that_are_right_though_odd(tmp_path: Path) -> None:
    path = with_header(
        tmp_path / "x.safetensors",
        {
            "__metadata__": {"format": "pt"},
            "deep": entry([1] * 16, 0, 4),
            "none": entry([0, 4], 4, 4),
            "as long as the file": entry([4], 4, 8, "U8"),
        },
        b"12345678",
    )
    found = open_safetensors(path)
    assert set(found) == {"deep", "none", "as long as the file"}
    assert found["deep"].load().shape == (1,) * 16
    assert found["none"].load().shape == (0, 4)
    assert bytes(found["as long as the file"].load().tolist()) == b"5678"


@pytest.mark.parametrize("more", [0, 1])
def test_an_empty_tensor_claims_no_more_rows_than_the_file_has_bytes(
    tmp_path: Path, more: int
) -> None:
    path = tmp_path / "x.safetensors"
    size = with_header(path, {"none": entry([0, 100], 0, 0)}).stat().st_size
    assert 50 < size < 99
    with_header(path, {"none": entry([0, size + more], 0, 0), "p": entry([1], 0, 1, "U8")}, b"x")
    size = path.stat().st_size
    with_header(path, {"none": entry([0, size + more], 0, 0), "p": entry([1], 0, 1, "U8")}, b"x")
    size = path.stat().st_size
    with_header(path, {"none": entry([0, size + more], 0, 0), "p": entry([1], 0, 1, "U8")}, b"x")
    assert path.stat().st_size == size
    if more:
        with pytest.raises(TensorFileError, match="malformed"):
            open_safetensors(path)
    else:
        assert open_safetensors(path)["none"].shape == (0, size)


@pytest.mark.parametrize("size", range(8, 11))
def test_the_header_may_fill_the_file_and_no_more(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", size - 8) + b"{}"[: size - 8])
    if size == 10:
        assert open_safetensors(path) == {}
    else:
        with pytest.raises(TensorFileError, match="JSON"):
            open_safetensors(path)
    path.write_bytes(struct.pack("<Q", size - 7) + b"{}"[: size - 8])
    with pytest.raises(TensorFileError, match="beyond the end") as caught:
        open_safetensors(path)
    assert (caught.value.found, caught.value.expected) == (size - 7, f"at most {size - 8}")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_a_whole_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(TensorFileError, match="beyond the end"):
        open_safetensors(tmp_path / "x.safetensors")


def test_a_header_beyond_the_librarys_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", (100 << 20) + 1))
        stream.truncate(200 << 20)
    with pytest.raises(TensorFileError, match="beyond the end"):
        open_safetensors(path)


def test_a_file_that_was_changed_is_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    torch.save({"a": torch.ones(4)}, tmp_path / "x.bin")
    for file in (path, tmp_path / "x.bin"):
        tensor = open_file(file)["a"]
        assert torch.equal(tensor.load(), torch.ones(4))
        os.utime(file, ns=(1, 1))
        for read in (tensor.load, lambda t=tensor: t.read_into(torch.empty(4), 0)):
            with pytest.raises(TensorFileError, match="changed while") as caught:
                read()
            assert (caught.value.file, caught.value.tensor) == (file, "a")


def test_a_file_that_became_shorter_ends_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    tensor = open_file(path)["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TensorFileError, match="ended") as caught:
        tensor.load()
    assert (caught.value.file, caught.value.tensor) == (path, "a")
    path.unlink()
    with pytest.raises(TensorFileError, match="opened") as caught:
        tensor.load()
    assert (caught.value.file, caught.value.tensor) == (path, "a")


# --- torch files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_torch_files_as_torch_reads_them(tmp_path: Path, zipped: bool, inside: bool) -> None:
    state = {str(d): tensor_of(d, (2, 3)) for d in DTYPES if zipped or "float8" not in str(d)}
    state["turned"] = torch.arange(6.0).reshape(2, 3).T
    state["gradient"] = torch.nn.Parameter(torch.ones(2))
    path = tmp_path / "x.bin"
    saved = {"state_dict": state, "epoch": 3} if inside else state
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    found = open_torch(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        lazy = found[name]
        assert (lazy.name, lazy.path, lazy.dtype) == (name, path, tensor.dtype)
        assert lazy.shape == tuple(tensor.shape)
        data = lazy.load()
        assert data.is_contiguous() and not data.requires_grad
        assert same_bytes(data, tensor.detach())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
        lazy.read_into(flat, 0)
        assert same_bytes(flat, tensor.detach().reshape(-1))


@pytest.mark.parametrize(
    "value",
    [
        *(3, None, [torch.ones(1)], torch.ones(2, dtype=torch.complex64)),
        *(torch.eye(2).to_sparse(), torch.ones(1, device="meta")),
        torch.ones(1).expand(100_000),
        torch.ones(0, 1 << 40),
    ],
    ids=["int", "None", "list", "complex", "sparse", "meta", "expanded", "long"],
)
def test_entries_that_are_no_plain_tensor(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.bin"
    torch.save({"fine": torch.ones(2), "odd": value}, path)
    with pytest.raises(TensorFileError, match="plain tensor") as caught:
        open_torch(path)
    assert (caught.value.file, caught.value.tensor) == (path, "odd")


@pytest.mark.parametrize("name", [3, "half a pair \ud800", "\udfff"])
def test_names_that_are_no_text(tmp_path: Path, name: object) -> None:
    torch.save({name: torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(TensorFileError, match="plain tensor"):
        open_torch(tmp_path / "x.bin")
    torch.save({"\ud7ff\ue000": torch.ones(2)}, tmp_path / "x.bin")
    assert list(open_torch(tmp_path / "x.bin")) == ["\ud7ff\ue000"]


@pytest.mark.parametrize("saved", [{}, [torch.ones(1)], torch.ones(1), 3])
def test_files_that_hold_no_state(tmp_path: Path, saved: object) -> None:
    torch.save(saved, tmp_path / "x.bin")
    with pytest.raises(TensorFileError, match="state dict") as caught:
        open_torch(tmp_path / "x.bin")
    assert caught.value.found == type(saved).__name__


class Filler:
    """Takes memory as a pickle says."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("zipped", [True, False])
def test_what_fills_memory_is_refused_wherever_it_stands(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    filler = Filler(bytearray, 1 << 45)
    for before in (0, (1 << 20) - 400, (1 << 20) - 5, 1 << 20):
        saved = {"pad": "x" * before, "filler": filler}
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(TensorFileError, match="more than tensors") as caught:
            refuse_filling(path)
        assert (caught.value.file, caught.value.found) == (path, "bytearray")
        with pytest.raises(TensorFileError, match="more than tensors"):
            load_torch(path)


def test_the_name_of_a_filler_across_two_pieces(tmp_path: Path) -> None:
    for offset in range(1, 14):
        raw = b"x" * ((1 << 20) - offset) + b"cbuiltins\nbytearray\n" + b"y" * 10
        with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
            archive.writestr("other", b"bytearray\n")
            archive.writestr("archive/DATA.PKL", raw)
        with pytest.raises(TensorFileError, match="more than tensors"):
            refuse_filling(tmp_path / "x.bin")


def test_a_filler_at_the_very_beginning(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"bytearray\n")
    with pytest.raises(TensorFileError, match="more than tensors"):
        refuse_filling(tmp_path / "x.bin")


def test_a_large_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path)
    saved = load_torch(path)
    assert isinstance(saved, dict)
    assert torch.equal(saved["a"], torch.ones(1000))
    assert str(path) in Path("/proc/self/maps").read_text()


def test_plain_files_pass(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data/0", b"bytearray\n")  # no pickle
        archive.writestr("archive/data.pkl", pickle.dumps({"bytearray": 1}))
    refuse_filling(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps({"bytearray": 1}))
    refuse_filling(tmp_path / "y.bin")


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(100)])
def test_files_that_are_no_archive(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(TensorFileError, match="cannot read") as caught:
        refuse_filling(tmp_path / "x.bin")
    assert caught.value.file == tmp_path / "x.bin"


def test_a_truncated_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, 300)
    with pytest.raises(TensorFileError) as caught:
        load_torch(path)
    assert caught.value.file == path


# --- several files, and what is read of a tensor


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
    for name, tensor in open_file(path).items():
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


# --- handles and JSON


def test_the_state_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    found = path.stat()
    assert state_at(path) == (found.st_dev, found.st_ino, 5, found.st_mtime_ns)
    assert state_of(found) == state_at(path)
    assert state_at(tmp_path / "none") is None
    assert there(path) and there(tmp_path)
    assert not there(tmp_path / "none") and not there(Path("x" * 5000))
    assert state_at(Path("x" * 5000)) is None
    assert check_file(path) == 5


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(TensorFileError, match="not a file") as caught:
            check_file(path)
        assert caught.value.file == path
    with pytest.raises(MissingError) as missing:
        check_file(tmp_path / "none")
    assert missing.value.file == tmp_path / "none"
    with pytest.raises(TensorFileError, match="cannot be read"):
        check_file(Path("x" * 5000))


def test_a_descriptor_is_closed_and_the_state_compared(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    state = state_at(path)
    assert state is not None
    with opened(path, state, "t") as fd:
        assert os.pread(fd, 9, 1) == b"2345"
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)
    with (
        pytest.raises(TensorFileError, match="changed") as caught,
        opened(path, state, "t") as fd,
    ):
        path.write_bytes(b"123456")
    assert (caught.value.file, caught.value.tensor) == (path, "t")
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)
    with pytest.raises(KeyError), opened(path, state) as fd:
        raise KeyError
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("kind", [BaseError, RunError])
def test_what_the_system_says_becomes_an_error_of_the_kind(
    tmp_path: Path, kind: type[DoraExportError]
) -> None:
    with pytest.raises(kind, match="No such file") as caught, reading(tmp_path, kind):
        (tmp_path / "none").read_bytes()
    assert caught.value.file == str(tmp_path / "none")
    with pytest.raises(kind) as caught, reading(tmp_path, kind):
        raise OSError(5, "Input/output error")
    assert caught.value.file == tmp_path
    own = MissingError("as it is")
    with pytest.raises(MissingError) as kept, reading(tmp_path, kind):
        raise own
    assert kept.value is own


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, {"b": "ä"}]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, {"b": "ä"}]}
    for text, says in (
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ('{"a": {"b": 1, "b": 2}}', "appears twice"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(TensorFileError, match=says) as caught:
            read_json(path)
        assert caught.value.file == path
    with pytest.raises(MissingError):
        read_json(tmp_path / "none")
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"


@pytest.mark.parametrize(("size", "fits"), [(100_000_000, True), (100_000_001, False)])
def test_the_largest_json_file(tmp_path: Path, size: int, fits: bool) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as stream:
        stream.truncate(size)
    with pytest.raises(TensorFileError, match="not valid JSON" if fits else "too large"):
        read_json(path)


# --- ONNX folders, by name


def test_what_an_onnx_folder_holds(tmp_path: Path) -> None:
    assert not is_onnx_folder(tmp_path)
    assert graphs_in(tmp_path) == []
    (tmp_path / "encoder_model.onnx").touch()
    (tmp_path / "decoder_with_past_model.onnx").touch()
    assert is_onnx_folder(tmp_path)
    assert [path.name for path in graphs_in(tmp_path)] == [
        "encoder_model.onnx",
        "decoder_with_past_model.onnx",
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").touch()
    assert is_onnx_folder(other)
    assert names("a.b") == ("a.b.lora_A", "a.b.lora_B", "a.b.lora_owner")
    assert head_names("m") == ("m.head_weight", "m.head_bias")
    assert heads_in([*head_names("z"), *head_names("m"), "x.lora_A"]) == ["m", "z"]


def test_the_names_that_others_know() -> None:
    """onnxruntime-genai's and Optimum's, and those of folders that were written before."""
    known = "MODEL BATCHED GENAI ENCODER DECODER WITH_PAST FOLDER SUFFIX OWN_HEADS ADAPTER_INDEX"
    assert [getattr(onnx_files, name) for name in known.split()] == [
        *("model.onnx", "batched.onnx", "genai_config.json", "encoder_model.onnx"),
        *("decoder_model.onnx", "decoder_with_past_model.onnx", "adapters", ".onnx_adapter"),
        *("base_heads.onnx_adapter", "adapter_index"),
    ]
    assert (onnx_files.LOGITS_POSITIONS, onnx_files.LABELS) == ("logits_positions", "labels")
    assert onnx_files.NO_ADAPTER == -1


def test_adapters_as_onnx_runtime_writes_them(tmp_path: Path) -> None:
    from onnxruntime import AdapterFormat, OrtValue

    path = tmp_path / "x.onnx_adapter"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({"m.lora_A": OrtValue.ortvalue_from_numpy(array)})
    adapter.export_adapter(str(path))
    found = read_adapter_file(path)
    assert found.keys() == {"m.lora_A"}
    assert np.array_equal(found["m.lora_A"], array)
    path.write_bytes(b"nonsense")
    with pytest.raises(TensorFileError, match="not an ONNX Runtime adapter") as caught:
        read_adapter_file(path)
    assert caught.value.file == path


# --- outputs


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_an_output_appears_whole_with_the_rights_of_a_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with output_folder(target) as folder:
        assert folder.parent == target.parent
        assert folder.name.startswith(".out.")
        assert not target.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        (folder / JOURNAL).write_text("not for others")
    assert listing(tmp_path) == {
        "a": None, "a/b": None, "a/b/out": None, "a/b/out/sub": None, "a/b/out/sub/file": b"x"
    }  # fmt: skip
    (tmp_path / "made").mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "made").stat().st_mode)


def test_the_mask_of_the_process_stays(tmp_path: Path) -> None:
    before = os.umask(0o27)
    try:
        with output_folder(tmp_path / "out"):
            pass
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
        assert os.umask(0o27) == 0o27
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [KeyError, SystemExit, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("x")
        raise error
    assert listing(tmp_path) == {}


def test_after_an_error_the_old_output_and_its_neighbours_stay(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    (tmp_path / "a" / "other").write_text("other")
    before = listing(tmp_path)
    with pytest.raises(KeyError), output_folder(target) as folder:
        (folder / "new").write_text("x")
        raise KeyError
    assert listing(tmp_path) == before
    with output_folder(target) as folder:
        (folder / "new").write_text("x")
    assert listing(target) == {"new": b"x"}
    assert [path.name for path in (tmp_path / "a").iterdir() if path.name[0] == "."] == []


def test_an_output_that_another_wrote_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="meanwhile") as caught, output_folder(target) as folder:
        (folder / "a").write_text("ours")
        target.mkdir()
        (target / "b").write_text("theirs")
    assert caught.value.file == target
    assert listing(tmp_path) == {"out": None, "out/b": b"theirs"}
    target = tmp_path / "empty"
    with output_folder(target) as folder:
        target.mkdir()
        (folder / "a").write_text("ours")
    assert listing(target) == {"a": b"ours"}


@pytest.mark.parametrize(
    ("number", "word"), [(28, "disk"), (5, "disk"), (30, "disk"), (27, "disk"), (122, "disk"),
                         (13, "file"), (1, "file"), (2, "file")]
)  # fmt: skip
def test_errors_of_the_system(tmp_path: Path, number: int, word: str) -> None:
    for name in (None, "there"):
        with pytest.raises(OutputError) as caught, output_folder(tmp_path / "out"):
            raise OSError(number, os.strerror(number), name)
        assert caught.value.file == (name or tmp_path / "out")
        assert os.strerror(number) in caught.value.message
        assert f"look after the {word}" in str(caught.value.remedy)
    assert listing(tmp_path) == {}


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), output_folder(tmp_path / "out"):
        raise OSError(32, "Broken pipe")


def test_sigterm_unwinds_and_the_handler_comes_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, output_folder(tmp_path / "out"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert listing(tmp_path) == {}


def test_outputs_from_another_thread(tmp_path: Path) -> None:
    done: list[object] = []

    def write() -> None:
        with output_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
        done.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert done == [True]
    assert listing(tmp_path / "out") == {"file": b"x"}


KILLED = """
import os, sys
from pathlib import Path
from converters.files.output import output_folder
with output_folder(Path(sys.argv[1]), resume="resume" in sys.argv) as folder:
    (folder / "half").write_text("x" * 5000)
    if "journal" in sys.argv:
        (folder / ".journal.jsonl").write_text("{}")
    print(folder, flush=True)
    os.read(0, 1)
"""


def killed(target: Path, *words: str) -> Path:
    """A folder whose process was killed (and its janitor, where it has one, has gone)."""
    command = [sys.executable, "-c", KILLED, str(target), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip())
        assert (folder / "half").stat().st_size == 5000
        with output_folder(target) as other:  # in use: not ours to remove
            (other / "file").write_text("another")
        assert folder.is_dir()
        process.kill()
        process.stdout.read()  # the janitor holds none of our ends
    return folder


def test_a_killed_command_with_resume_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder = killed(target, "resume", "journal")
    assert folder.is_dir()
    with output_folder(target, resume=True) as again:
        assert again == folder
        assert (again / "half").exists()
    assert listing(target).keys() == {"half"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("words", [("resume",), ("resume", "journal")])
def test_what_a_killed_command_left_is_removed(tmp_path: Path, words: tuple[str, ...]) -> None:
    target = tmp_path / "out"
    folder = killed(target, *words)
    assert folder.is_dir()
    with output_folder(target) as again:
        assert again != folder and not folder.exists()
        assert not (again / "half").exists()


def test_a_system_that_cannot_exchange_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on one whose C library has no `renameat2`."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    target = tmp_path / "out"
    for content in ("old", "new"):
        with output_folder(target) as folder:
            (folder / content).write_text(content)
        assert listing(target) == {content: content.encode()}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_group_of_processes_leaves_nothing(tmp_path: Path) -> None:
    """The janitor is in a group of its own, and outlives the one that is killed."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip())
        assert folder.is_dir()
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert listing(tmp_path) == {}


def test_an_interrupted_command_with_resume_leaves_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for error in (SystemExit, KeyboardInterrupt):
        with pytest.raises(error), output_folder(target, resume=True) as folder:
            (folder / JOURNAL).write_text("{}")
            raise error
        assert (folder / JOURNAL).exists()
    with pytest.raises(ValueError), output_folder(target, resume=True) as folder:
        raise ValueError
    assert listing(tmp_path) == {}


def test_the_old_output_of_a_stopped_machine_comes_back(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcd1234.dora-tmp"
    (left / "old").mkdir(parents=True)
    (left / "old" / "file").write_text("old")
    with pytest.raises(KeyError), output_folder(tmp_path / "out"):
        raise KeyError
    assert listing(tmp_path) == {"out": None, "out/file": b"old"}
    (left / "old").mkdir(parents=True)
    (left / "old" / "file").write_text("older")
    with pytest.raises(KeyError), output_folder(tmp_path / "out"):
        raise KeyError
    assert listing(tmp_path) == {"out": None, "out/file": b"old"}


def test_folders_that_only_look_like_ours_stay(tmp_path: Path) -> None:
    stays = [
        ".out.abc.dora-tmp",
        ".out.abcd12345.dora-tmp",
        ".xout.abcd1234.dora-tmp",
        "out.abcd1234.dora-tmp",
    ]
    for name in [*stays, ".out.abcd1234.dora-tmp"]:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcd4321.dora-tmp").symlink_to(tmp_path / stays[0])
    with output_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*stays, "out", ".out.abcd4321.dora-tmp"}


def test_what_cannot_be_removed_stays_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / ".adding.left.dora-tmp").write_text("no folder")
    with addition(tmp_path):
        pass
    assert listing(tmp_path) == {".adding.left.dora-tmp": b"no folder"}


def test_additions_are_made_one_at_a_time_and_disappear(tmp_path: Path) -> None:
    (tmp_path / ".adding.left.dora-tmp").mkdir()
    (tmp_path / "file").write_text("x")
    with addition(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".adding.") and folder.name.endswith(".dora-tmp")
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]
        order: list[str] = []

        def second() -> None:
            with addition(tmp_path):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert listing(tmp_path) == {"file": b"x"}
    with pytest.raises(OutputError) as caught, addition(tmp_path / "none"):
        pass
    assert caught.value.file == tmp_path / "none"
    with pytest.raises(OutputError), addition(tmp_path):
        raise OSError(28, "No space left on device")


def test_save_tensors(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.arange(3))
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }
    with pytest.raises(OutputError) as caught:
        save_tensors({"a": torch.arange(3)}, tmp_path / "none" / "x.safetensors")
    assert caught.value.file == tmp_path / "none" / "x.safetensors"


def test_outputs_that_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    write_certificate(tmp_path / "full", {"tool": tool()})
    (tmp_path / "input").mkdir()
    inputs = [tmp_path / "input", tmp_path / "input2"]
    for target in ("empty", "new", "new/deep/er", "input-like"):
        check_output(tmp_path / target, False, inputs)
    check_output(tmp_path / "full", True, inputs)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full", "input"}


def test_outputs_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "base" / "input").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "base" / "input")
    inputs = [tmp_path / "elsewhere", tmp_path / "base" / "input"]
    for target in ("base/input", "base/input/deep/er", "base", "link", "link/deep"):
        with pytest.raises(OutputError, match="inside an input") as caught:
            check_output(tmp_path / target, True, inputs)
        assert caught.value.file == tmp_path / target
        assert caught.value.found == f"input {tmp_path / 'base' / 'input'}"
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "full" / "file", True, inputs)
    with pytest.raises(OutputError, match="not empty"):
        check_output(tmp_path / "full", False, inputs)
    free = os.statvfs(tmp_path)
    space = free.f_bavail * free.f_frsize
    check_output(tmp_path / "new", False, inputs, space // 2)
    with pytest.raises(OutputError, match="space"):
        check_output(tmp_path / "new" / "deep", False, inputs, space * 2)


def test_the_space_of_a_killed_command_counts_as_free(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcd1234.dora-tmp"
    left.mkdir()
    with (left / "shard").open("wb") as stream:
        stream.write(bytes(64 << 20))
        os.fsync(stream.fileno())
    target = tmp_path / "out"

    def refused(resume: bool) -> bool:
        free = os.statvfs(tmp_path)
        try:
            check_output(target, False, [], free.f_bavail * free.f_frsize + (32 << 20), resume)
        except OutputError as error:
            assert "GB free" in str(error.found)
            return True
        return False

    assert refused(resume=True)
    (left / JOURNAL).write_text("{}")
    assert refused(resume=False)
    assert not refused(resume=True)


def test_a_pickle_in_memory_is_never_loaded() -> None:
    """The control of `Filler`: its pickle does what the tests above say it would."""
    raw = io.BytesIO()
    torch.save({"filler": Filler(bytearray, 5)}, raw)
    raw.seek(0)
    assert torch.load(raw, weights_only=True)["filler"] == bytearray(5)
