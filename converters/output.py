"""An output folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from .errors import OutputError

_SUFFIX = ".dora-tmp"
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def check_output(target: Path, force: bool, inputs: Iterable[Path], size: int = 0) -> None:
    """Raise `OutputError` when `target` may not or cannot be written, before anything is."""
    resolved = target.resolve()
    for source in (path.resolve() for path in inputs):
        if resolved == source or source in resolved.parents or resolved in source.parents:
            raise OutputError(
                "the output would lie inside an input, or hold it",
                file=target,
                found=f"input {source}",
                remedy="choose an output folder of its own",
            )
    if target.exists() and not target.is_dir():
        raise OutputError("the output is a file", file=target, expected="a folder to make")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(
            "the output folder is not empty",
            file=target,
            remedy="choose another, or pass --force to replace it",
        )
    parent = resolved.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise OutputError("no permission to write here", file=parent)
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OutputError(
            "not enough space for the output",
            file=target,
            found=f"{free / 1e9:.2f} GB free",
            expected=f"{size / 1e9:.2f} GB",
            remedy="free some space or choose another disk",
        )


@contextlib.contextmanager
def output_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; on leaving it becomes `target`, on any error it disappears.

    It lies beside `target` under a hidden name. SIGTERM counts as an error. A process that is
    killed is outlived by its janitor, which removes the folder; should that be killed too (or the
    machine stop), the lock on the folder is free and the next command with this target removes it.
    """
    target = target.resolve()
    made = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent))
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with _terminate_as_exit(), _janitor(folder):
            folder.chmod(0o777 & ~_umask())
            yield folder
            _sync_tree(folder)
            _swap(folder, target)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
            raise OutputError(
                f"writing failed: {os.strerror(error.errno)}",
                file=target,
                remedy="nothing was left behind; free some space and run again",
            ) from error
        raise
    finally:
        os.close(lock)


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def _swap(folder: Path, target: Path) -> None:
    if target.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent))
        target.rename(old / "old")
        try:
            folder.rename(target)
        except BaseException:
            (old / "old").rename(target)
            raise
        shutil.rmtree(old)
    else:
        folder.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _remove_stale(target: Path) -> None:
    for path in target.parent.glob(f".{target.name}.*{_SUFFIX}"):
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (path / "old").is_dir() and not target.exists():
                (path / "old").rename(target)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(fd)


@contextlib.contextmanager
def _janitor(folder: Path) -> Iterator[None]:
    """A shell that waits for a pipe which only our end, by whatever cause, can close."""
    with subprocess.Popen(
        ["/bin/sh", "-c", 'cat >/dev/null; rm -rf -- "$0"', str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ):
        yield


@contextlib.contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the temporary folder is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
