"""Safetensors files against the library that defines them: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from converters.errors import (
    TensorFileError,
)
from converters.files.tensors import (
    nbytes,
    numel,
    open_file,
    open_safetensors,
)
from tests.converters.files.dtypes import DTYPES, same_bytes, tensor_of


def with_header(path: Path, entries: Mapping[str, object], data: bytes = b"") -> Path:
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


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
