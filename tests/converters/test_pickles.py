"""Torch files that would fill more memory than they have bytes."""

from __future__ import annotations

import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converters.errors import DoraExportError
from converters.files.tensors import load_torch, open_torch
from tests.fuzz.archives import with_pickle

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


def test_a_pickle_is_found_by_the_name_that_torch_finds(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path)
    with_pickle(path, pickle.dumps(Zeros(), protocol=2))
    with pytest.raises(DoraExportError, match="more than tensors"):
        load_torch(path)
