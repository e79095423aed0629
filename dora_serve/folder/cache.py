"""Artifacts made once: a folder per content of a run, its base and what was asked for."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from converters.certificate import tool
from converters.errors import DoraExportError, OutputError, RunError
from converters.files.cache import ELSEWHERE, cache_folder, private_cache
from converters.files.handles import reading
from converters.files.hashes import file_hash
from converters.model.base import BaseModel
from converters.run import Run

from .inventory import Member


def content_key(run: Run, base: BaseModel | None, **asked: object) -> str:
    """A name for what comes out of `run` on `base` when `asked` for: the hash of the run's files,
    of the base's tensors and configuration, of the options and of this program's version."""
    files = [(path.name, file_hash(path)) for path in run.files]
    known = None if base is None else base.identity
    said = [tool(), files, run.method, dict(run.options), known, asked]
    return key_of(said)


def key_of(said: object) -> str:
    """A name in the cache for what is made from all that is `said`."""
    text = json.dumps(said, sort_keys=True, default=str)
    return blake3(text.encode()).hexdigest(length=16)


def member_key(member: Member, **asked: object) -> str:
    """The `content_key` of a run and its base. Raises `RunError` when the run changed since reading
    it began: what comes out of it would be kept under the name of something else."""
    with reading(member.path, RunError):
        key = content_key(member.run, member.base, **asked)
    if member.changed():
        raise RunError(
            "the run changed while it was read",
            file=member.path,
            remedy="run again when nothing writes to it",
        )
    return key


def cached(key: str, make: Callable[[Path], object]) -> Path:
    """The folder called `key`, made by `make(folder)` unless it is there as it was made: every file
    of it, with every byte, and nothing else. Where it is not, that is said, and it is made anew.

    Whoever comes while it is being made, in this process or another, waits for it. Raises
    `OutputError` where the cache cannot be used, see `private_cache`.
    """
    target = private_cache() / key
    if not _is_as_made(target):
        with _lock(key):
            if not _is_as_made(target):
                _clear(target)
                make(target)
                _write_receipt(target, _content(target))
    return target


def is_cached(key: str) -> bool:
    """Whether `cached` would have nothing to make."""
    return _is_as_made(private_cache() / key)


def _receipt(target: Path) -> Path:
    """The file that says what `make` made at `target`, null while it makes; and so that what is
    there is ours."""
    return target.parent / "receipts" / f"{target.name}.json"


def _write_receipt(target: Path, content: dict[str, str] | None) -> None:
    receipt = _receipt(target)
    new = receipt.with_suffix(".new")
    with _writing(receipt):
        receipt.parent.mkdir(exist_ok=True)
        new.write_text(json.dumps(content), encoding="utf-8")
        new.replace(receipt)


def _content(folder: Path) -> dict[str, str]:
    """Path in `folder` → hash of a file, or what else it is. Raises `DoraExportError` where one
    cannot be read, or is a pipe or the like."""
    with reading(folder, OutputError):
        # A name may be bytes that are no text.
        return {str(path.relative_to(folder)): _what(path) for path in sorted(folder.rglob("*"))}


def _what(path: Path) -> str:
    if path.is_symlink():
        return "link"
    return "folder" if path.is_dir() else file_hash(path)


def _is_as_made(target: Path) -> bool:
    """Whether `target` is what its receipt says. Hashes what is not known of the files' states."""
    try:
        known = json.loads(_receipt(target).read_bytes())
        found = target.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        return ours and _content(target) == known
    except (OSError, ValueError, DoraExportError):
        return False


def _clear(target: Path) -> None:
    """Make room for `target`: what was made there is removed, what somebody else put there moved
    aside."""
    receipt = _receipt(target)
    with _writing(target):
        if os.path.lexists(target):
            if receipt.exists() and target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
                done = "it is made anew"
            else:
                aside = Path(tempfile.mkdtemp(prefix=f"aside-{target.name}.", dir=target.parent))
                target.rename(aside / target.name)
                done = f"moved to {aside}, and made anew"
            print(f"{target}: not what was made there; {done}", file=sys.stderr)
    _write_receipt(target, None)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turn what the system says into an error that names the cache: what was to be made is not to
    blame."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the cache cannot be written: {error.strerror}", file=place, remedy=ELSEWHERE
        ) from None


@contextmanager
def _lock(name: str) -> Iterator[None]:
    folder = cache_folder() / "locks"
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
