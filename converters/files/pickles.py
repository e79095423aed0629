"""Pickles that torch takes for plain data, but that fill more memory than the file has bytes."""

from __future__ import annotations

import mmap
import os
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from ..errors import TensorFileError

# On torch's list of harmless functions, but filling memory: `bytearray(n)` with zeros, and the copy
# of a tensor whose stride is zero.
_FILLS = (b"bytearray\n", b"_rebuild_device_tensor_from_")
_PIECE = 1 << 20
_ZIP = b"PK\x03\x04"  # so torch tells its two formats apart
_LEGACY = 5  # pickles that the older one begins with
_LONGEST = 1 << 28  # bytes of these; what lies behind may be terabytes, of holes too
_FILLED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS"}
_PARTS = 1 << 26  # more than any file of tensors has; hashed in seconds


def refuse_filling(path: Path) -> None:
    """Raise `TensorFileError` where the pickle in a torch file names a function that takes as much
    memory as it is told, would be larger unpacked than it is, holds tuples that would take forever
    to compare, or where it cannot be read."""
    try:
        found = next((n for piece in _pieces(path) for n in _FILLS if piece.find(n) >= 0), None)
        for stream in _pickles(path) if found is None else ():
            _refuse_growing(stream)
    except PermissionError as error:
        raise TensorFileError(f"cannot be read: {error.strerror}", file=path) from None
    except (
        OSError,
        ValueError,
        LookupError,
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        EOFError,
    ) as error:
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


def _begin(stream: BinaryIO) -> mmap.mmap:
    size = min(os.fstat(stream.fileno()).st_size, _LONGEST)
    return mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ)


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """The streams that begin with a pickle, each as often as there is one behind the other."""
    with path.open("rb") as stream:
        if stream.read(4) != _ZIP:
            # A file takes memory for as many bytes as it is asked for, a map for those it has.
            with _begin(stream) as whole:
                for _ in range(_LEGACY):
                    yield cast(IO[bytes], whole)
                    if whole.tell() == len(whole):
                        break
            return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed, which torch.save never does")
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):
                with archive.open(entry) as pickled:
                    yield pickled


def _refuse_growing(stream: IO[bytes]) -> None:
    """Raise `ValueError` where what is hashed, as a key is, would have too many parts written out.

    A tuple that holds another twice, which holds another twice, is a few bytes and never hashed to
    its end; nothing can interrupt that.
    """
    # What torch's unpickler has on its stack, each as the number of its parts.
    stack: list[list[int]] = []
    marks: list[int] = []
    memo: dict[object, list[int]] = {}
    hashed = 0
    for operation, argument, _ in pickletools.genops(stream):
        name = operation.name
        if name == "MARK":
            marks.append(len(stack))
        elif name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        else:
            before = operation.stack_before
            marked = pickletools.markobject in before
            begin = marks.pop() if marked else len(stack) - len(before)
            filled = name in _FILLED  # the dict or list below, which stays there
            begin += filled and not marked
            if begin < filled:
                raise ValueError("a pickle that takes more than it has")
            parts = sum(part[0] for part in stack[begin:])
            del stack[begin:]
            if filled:
                stack[-1][0] = min(stack[-1][0] + parts, 1 << 60)
            elif operation.stack_after:
                stack.append([min(1 + parts, 1 << 60)])
            if not name.startswith("TUPLE"):
                hashed += parts
            if hashed > _PARTS:
                raise ValueError("tuples in tuples that never end")


def _pieces(path: Path) -> Iterator[bytes | mmap.mmap]:
    with path.open("rb") as stream:
        if stream.read(4) != _ZIP:
            with _begin(stream) as whole:
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
