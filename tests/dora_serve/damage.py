"""Files that change, seen or unseen."""

from __future__ import annotations

import time
from pathlib import Path

from converters.files import hashes


def settle() -> None:
    """Until what was written is no longer taken for what may be being written."""
    time.sleep(hashes._SETTLED / 1e9 + 0.02)


def flip(path: Path, at: float = 1.0) -> None:
    """Another value of one bit, in a file of the same size."""
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(len(data) * at))] ^= 1
    path.write_bytes(data)
