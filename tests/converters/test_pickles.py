"""Torch files that would fill more memory than they have bytes."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converters.errors import DoraExportError
from converters.files.tensors import load_torch, open_torch
from tests.fuzz.archives import pickle_in, with_pickle

SIZE = 4 << 30


class Zeros:
    """Pickled as `bytearray(SIZE)`."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[int]]:
        return bytearray, (SIZE,)


class Copied:
    """Pickled as the copy in float64 of a tensor that repeats one number."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        one = torch.zeros(1).expand(SIZE // 8)
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (one, torch.float64, "cpu", False)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", [Zeros(), Copied()], ids=["zeros", "copy"])
def test_memory_is_not_filled_at_a_files_word(tmp_path: Path, value: object, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": value}, path, _use_new_zipfile_serialization=zipped)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DoraExportError, match="more than tensors"):
        open_torch(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < SIZE >> 12


def test_a_file_is_no_larger_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path)
    stored = pickle_in(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", stored + bytes(100 << 20))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DoraExportError, match="compressed"):
        load_torch(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50 << 10


@pytest.mark.parametrize("way", ["a key", "a list", "the older format"])
@pytest.mark.parametrize("levels", [4, 60])
def test_tuples_in_tuples_are_not_hashed_for_ever(way: str, levels: int, tmp_path: Path) -> None:
    """Each holds the one before twice: a torch that reads it would never come back."""
    pairs = b"K\x01K\x01\x86q\x01"
    for level in range(1, levels):
        pairs += b"h%ch%c\x86q%c" % (level, level, level + 1)
    head, key = b"\x80\x02", b"(" + pairs + b"t"
    data = head + b"}" + key + b"K\x01s."
    if way == "a list":
        data = head + b"ccollections\nOrderedDict\n]" + key + b"K\x01\x86a\x85R."
    path = tmp_path / "x.bin"
    torch.save({}, path, _use_new_zipfile_serialization=way != "the older format")
    if way == "the older format":
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b"\x80\x02}q\x00.", data, 1))
        assert path.read_bytes() != raw
    else:
        with_pickle(path, data)
    if levels == 4:
        made = load_torch(path)
        assert isinstance(made, dict) and len(made) == 1
    else:
        with pytest.raises(DoraExportError, match="tuples in tuples"):
            load_torch(path)


def test_a_pickle_is_found_by_the_name_that_torch_finds(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path)
    with_pickle(path, pickle.dumps(Zeros(), protocol=2))
    with pytest.raises(DoraExportError, match="more than tensors"):
        load_torch(path)


def test_what_lies_behind_the_pickles_is_not_read(tmp_path: Path) -> None:
    """Terabytes of holes, behind tensors and alone."""
    path, size = tmp_path / "x.pt", 1 << 41
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, size)
    assert open_torch(path)["a"].shape == (2,)
    (tmp_path / "holes.pt").touch()
    os.truncate(tmp_path / "holes.pt", size)
    with pytest.raises(DoraExportError, match="cannot read"):
        open_torch(tmp_path / "holes.pt")
