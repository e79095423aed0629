"""Torch files with another pickle inside."""

from __future__ import annotations

import zipfile
from pathlib import Path


def pickle_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return archive.read(name)


def with_pickle(path: Path, data: bytes) -> None:
    """Make the archive anew around another pickle, so that its check sums are right."""
    fresh = path.with_name("fresh.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(fresh, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    fresh.replace(path)
