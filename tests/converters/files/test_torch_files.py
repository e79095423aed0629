"""Torch files against torch: what is read, and what is refused before it is unpickled."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converters.errors import (
    TensorFileError,
)
from converters.files.pickles import refuse_filling
from converters.files.tensors import (
    load_torch,
    open_torch,
)
from tests.converters.files.dtypes import DTYPES, same_bytes, tensor_of


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


@pytest.mark.parametrize("saved", [[torch.ones(1)], torch.ones(1), 3])
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


def test_a_pickle_in_memory_is_never_loaded() -> None:
    """The control of `Filler`: its pickle does what the tests above say it would."""
    raw = io.BytesIO()
    torch.save({"filler": Filler(bytearray, 5)}, raw)
    raw.seek(0)
    assert torch.load(raw, weights_only=True)["filler"] == bytearray(5)
