"""Weights that ONNX Runtime reads from their file as long as it runs.

It packs most matrices into memory of its own, but maps what it reads as it lies there, such as the
embeddings. Whoever writes the file in place (`cp`, `rsync --inplace`, a sync from a bucket) would
change the numbers of a model that runs, and one who cuts it off would end the process.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_MAP = re.compile(
    r"^(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) r\S+ \S+ \S+ \d+ +(?P<file>/.*)$", re.MULTILINE
)
_READ_WRITE, _PRIVATE_ANONYMOUS, _MOVE_TO = 3, 0x22, 3  # as Linux numbers them
_FAILED = ctypes.c_void_p(-1).value


def part_from_files(folder: Path) -> None:
    """Put copies in the place of what this process has mapped of the files in `folder`.

    A private map is not enough: what is cut off of a file goes from such a map too, even where it
    was written. Raises `OSError` where there is no memory for them.
    """
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    except OSError:  # not Linux
        return
    real = folder.resolve()
    for found in _MAP.finditer(maps):
        if Path(found["file"]).parent == real:
            begin, end = int(found["begin"], 16), int(found["end"], 16)
            _replace(begin, end - begin)


def _replace(begin: int, size: int) -> None:
    """Have the memory at `begin` be a copy of itself, at every moment whole."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = system.mremap.restype = ctypes.c_void_p
    place, length = ctypes.c_void_p, ctypes.c_size_t
    own = system.mmap(None, length(size), _READ_WRITE, _PRIVATE_ANONYMOUS, -1, ctypes.c_long(0))
    if own != _FAILED:
        ctypes.memmove(own, begin, size)
        own = system.mremap(place(own), length(size), length(size), _MOVE_TO, place(begin))
    if own == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
