"""Pickles that torch takes for plain data, but that fill more memory than the file has bytes."""

from __future__ import annotations

import mmap
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import TensorFileError

# On torch's list of harmless functions, but filling memory: `bytearray(n)` with zeros, and the copy
# of a tensor whose stride is zero.
_FILLS = (b"bytearray\n", b"_rebuild_device_tensor_from_")
_PIECE = 1 << 20


def refuse_filling(path: Path) -> None:
    """Raise `TensorFileError` where the pickle in a torch file names a function that takes as much
    memory as it is told, or where it cannot be read."""
    try:
        found = next((n for piece in _pieces(path) for n in _FILLS if piece.find(n) >= 0), None)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise TensorFileError(
            "torch cannot read this file",
            file=path,
            found=str(error)[:200],
            expected="a dict of tensors saved by torch.save",
            remedy="the file is damaged or incomplete: copy or download it again",
        ) from None
    if found is not None:
        raise TensorFileError(
            "the file holds more than tensors, and nothing of it is executed",
            file=path,
            found=found.decode().strip(),
            expected="a dict of tensors saved by torch.save",
            remedy="if you trust it, load and save its tensors as safetensors yourself",
        )


def _pieces(path: Path) -> Iterator[bytes | mmap.mmap]:
    with path.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"  # so torch tells them apart
        if not zipped:
            with mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as whole:
                yield whole
            return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):
                with archive.open(entry) as pickled:
                    end = b""
                    while piece := pickled.read(_PIECE):
                        yield end + piece
                        end = piece[-64:]
