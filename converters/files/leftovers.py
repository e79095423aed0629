"""What killed commands left beside an output: their hidden folders, which a lock tells from those
of commands that run."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path

# In a temporary folder: this file says which parts of the output are whole. It is never published.
JOURNAL = ".journal.jsonl"
SUFFIX = ".dora-tmp"


def leftovers(target: Path) -> list[Path]:
    """The temporary folders of commands with this target, whether they run or were killed."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.\w{{8}}{re.escape(SUFFIX)}")
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]


def _claim(folder: Path) -> int | None:
    """The descriptor by which we lock a leftover; None where a command is still at it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        # Whoever may write beside the target could put a folder here: ours alone is believed.
        if os.fstat(fd).st_uid == os.geteuid():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def kept_folder(target: Path) -> tuple[Path, int] | None:
    """A killed command's folder with a journal, and the descriptor by which we lock it."""
    for path in leftovers(target):
        lock = _claim(path)
        if lock is None:
            continue
        if (path / JOURNAL).is_file():
            return path, lock
        os.close(lock)
    return None


def kept_bytes(target: Path) -> int:
    """The space that killed commands' folders with a journal take."""
    kept = [path for path in leftovers(target) if (path / JOURNAL).is_file()]
    return sum(file.lstat().st_blocks * 512 for path in kept for file in path.rglob("*"))


def remove_stale(target: Path) -> None:
    for path in leftovers(target):
        lock = _claim(path)
        if lock is None:
            continue
        try:
            if (path / "old").is_dir() and not target.exists():
                (path / "old").rename(target)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)
