"""Artifacts made once: a folder per content of a run, its base and what was asked for."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from converters.certificate import sha256
from converters.errors import OutputError, RunError
from converters.files.handles import reading
from converters.model.base import BaseModel
from converters.run import Run

from .inventory import Member


def cache_folder() -> Path:
    """`$DORA_SERVE_CACHE`, else `dora-serve` in the user's cache folder."""
    own = os.environ.get("DORA_SERVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora-serve"


def content_key(run: Run, base: BaseModel | None, **asked: object) -> str:
    """A name for what comes out of `run` on `base` when `asked` for: the hash of the run's files,
    of the base's adapted weights, of the options and of this program's version."""
    digest = hashlib.sha256()
    for path in run.files:
        digest.update(f"{path.name} {_known_sha256(path)}\n".encode())
    weights = {} if base is None else base.fingerprint(run.updates)
    said = [version("dora-serve"), run.method, dict(run.options), weights, asked]
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


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
    """The folder called `key`, made by `make(folder)` unless it is there.

    Whoever comes while it is being made, in this process or another, waits for it.
    """
    target = cache_folder() / key
    if not target.is_dir():
        with _lock(key):
            if not target.is_dir():
                make(target)
    return target


@contextmanager
def _lock(name: str) -> Iterator[None]:
    folder = cache_folder() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise OutputError(
            f"the cache cannot be written: {error.strerror}",
            file=cache_folder(),
            remedy="set DORA_SERVE_CACHE to a folder that can be",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _known_sha256(path: Path) -> str:
    """The SHA-256 of a file, remembered as long as its size, time and inode stay the same."""
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    memory = cache_folder() / "hashes" / hashlib.sha256(state.encode()).hexdigest()[:32]
    with suppress(OSError):
        value = memory.read_text(encoding="ascii")
        if len(value) == 2 * hashlib.sha256().digest_size:  # else its writer was killed
            return value
    value = sha256(path)
    with suppress(OSError):  # it is only remembered to save time
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(value, encoding="ascii")
    return value
