"""An output folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..certificate import FILE, strangers
from ..errors import OutputError
from .handles import mounts, reading
from .leftovers import JOURNAL, SUFFIX, kept_bytes, kept_folder, remove_stale

if TYPE_CHECKING:
    import torch

_NAMED = 5  # of what lies in the way
_LATER = 0.05  # seconds
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOENT)
_SCARCE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # processes, files, memory


def check_output(
    target: Path, force: bool, inputs: Iterable[Path], size: int = 0, resume: bool = False
) -> None:
    """Raise `OutputError` when `target` may not or cannot be written, before anything is: see
    `check_place`. `force` lets an output of ours be replaced, and nothing else."""
    check_place(target, inputs, size, resume)
    with reading(target, OutputError):
        if _is_empty(target):
            return
    if not force:
        raise OutputError(
            "the output folder is not empty",
            file=target,
            remedy="choose another, or pass `force` to replace what dora-export wrote",
        )
    check_ours(target)


def check_place(target: Path, inputs: Iterable[Path], size: int = 0, resume: bool = False) -> None:
    """Raise `OutputError` when there can be no output `target`, whatever is in it now. With
    `resume`, the space that a killed command's folder takes counts as free."""
    resolved = _resolved(target)
    for source in map(_resolved, inputs):
        if _is_in(resolved, source) or _is_in(source, resolved):
            raise OutputError(
                "the output would lie inside an input, or hold it",
                file=target,
                found=f"input {source}",
                remedy="choose an output folder of its own",
            )
    if os.path.lexists(resolved) and not resolved.is_dir():
        raise OutputError("the output is a file", file=target, expected="a folder to make")
    if os.path.lexists(resolved):
        _check_free(target, resolved)
    parent = _first_there(resolved.parent)
    if not parent.is_dir():
        raise OutputError("the output lies below a file", file=target, found=parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("no permission to write here", file=parent)
    free = shutil.disk_usage(parent).free + (kept_bytes(resolved) if resume else 0)
    if size > free:
        raise OutputError(
            "not enough space for the output",
            file=target,
            found=f"{free / 1e9:.6f} GB free",
            expected=f"{size / 1e9:.6f} GB",
            remedy="free some space or choose another disk",
        )


def check_ours(target: Path) -> None:
    """Raise `OutputError` when something lies in the folder `target` that we did not write."""
    left = re.compile(rf"\.adding\.\w{{8}}{re.escape(SUFFIX)}(/.*)?")
    with reading(target, OutputError):
        others = [name for name in strangers(target) if not left.fullmatch(name)]
    if others:
        more = f", and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise OutputError(
            "the output folder holds what was not written here, or was changed since",
            file=target,
            found=", ".join(others[:_NAMED]) + more,
            expected="an empty folder, or an output as its certificate says",
            remedy="choose another folder, or move away what is in this one",
        )
    for folder, _, _ in os.walk(target):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError("no permission to remove what is here", file=folder)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, no name of a file
        raise OutputError("no possible path", file=path, found=error) from None


def _is_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or in it, by whatever name: what is mounted twice has two."""
    if path == folder or folder in path.parents:
        return True
    try:
        own = folder.stat()
        there = _first_there(path)
        return any(os.path.samestat(own, one.stat()) for one in (there, *there.parents))
    except OSError:  # what cannot be looked at is not there, or is nobody's input
        return False


def _first_there(path: Path) -> Path:
    """`path`, or the first above it where something is."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def _check_free(target: Path, resolved: Path) -> None:
    """Raise `OutputError` where a folder could not be put into another's place."""
    with contextlib.suppress(FileNotFoundError):  # where we are was removed
        here = Path.cwd()
        if resolved == here or resolved in here.parents:
            raise OutputError(
                "the output would replace the current folder, or one above it",
                file=target,
                found=here,
                remedy="choose another, or run this from elsewhere",
            )
    for mount in mounts():
        if mount == resolved or resolved in mount.parents:
            raise OutputError(
                "a file system is mounted on the output folder, or in it",
                file=target,
                found=mount,
                remedy="choose a folder below the mount point",
            )


@contextlib.contextmanager
def output_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """A folder to write into; on leaving it becomes `target`, on any error it disappears.

    It lies beside `target` under a hidden name. SIGTERM counts as an error. A process that is
    killed is outlived by its janitor, which removes the folder; should that be killed too (or the
    machine stop), the lock on the folder is free and the next command with this target removes it.
    With `resume` there is a `JOURNAL` in it: the folder of a killed or interrupted process stays,
    and the next with `resume` is given it; any other command removes it.
    Raises `OutputError` when writing fails, or somebody else wrote to `target` meanwhile.
    """
    target = _resolved(target)
    empty, certified = _is_empty(target), (target / FILE).is_file()
    made = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    with _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = kept_folder(target) if resume else None
        remove_stale(target)
        folder, lock = kept or _locked_folder(target.parent, f".{target.name}.")
    janitor = contextlib.nullcontext() if resume else _janitor(folder)
    try:
        with _write_errors(target), _terminate_as_exit(), janitor:
            inherited = folder.stat().st_mode & stat.S_ISGID
            folder.chmod(inherited | 0o777 & ~_umask())
            if resume:
                (folder / JOURNAL).touch()
            yield folder
            for path in (*folder.rglob("*"), folder):
                _fsync(path)
            if empty and not _is_empty(target):
                raise OutputError(
                    "another command wrote the output meanwhile",
                    file=target,
                    remedy="choose another, or pass `force` to replace it",
                )
            if certified and not _is_empty(target):
                check_ours(target)
            (folder / JOURNAL).unlink(missing_ok=True)
            _swap(folder, target)
    except BaseException as error:
        if resume and isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def addition(target: Path) -> Iterator[Path]:
    """A folder in the output folder `target` to make additions in; it disappears on leaving.

    One command at a time has one, others wait. What a killed one left is removed by the next.
    """
    try:
        lock = os.open(target, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot be opened: {error.strerror}", file=target) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in target.glob(f".adding.*{SUFFIX}"):
            shutil.rmtree(left, ignore_errors=True)
        made = tempfile.TemporaryDirectory(prefix=".adding.", suffix=SUFFIX, dir=target)
        with _write_errors(target), _terminate_as_exit(), made as folder:
            yield Path(folder)
    finally:
        os.close(lock)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target`, under a hidden name, that disappears on leaving and, as that of
    `output_folder`, however this process ends."""
    with _write_errors(target):
        remove_stale(target)
        folder, lock = _locked_folder(target.parent, f".{target.name}.")
    try:
        with _terminate_as_exit(), _janitor(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder in the system's temporary one that disappears as `scratch` does."""
    with (
        tempfile.TemporaryDirectory() as name,
        _terminate_as_exit(),
        _janitor(Path(name)),
    ):
        yield Path(name)


@contextlib.contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = {_DISK_ERRORS: "disk", _FILE_ERRORS: "file", _SCARCE: "limits of this machine"}
        cause = next((said for codes, said in what.items() if error.errno in codes), None)
        if cause is None or error.errno is None:
            raise
        raise OutputError(
            f"reading or writing failed: {os.strerror(error.errno)}",
            file=error.filename or target,
            remedy=f"nothing was left behind; look after the {cause} and run again",
        ) from error


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OutputError` when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # the library makes it the user's alone
    except SafetensorError as error:
        raise OutputError(
            str(error), file=path, remedy="look after the disk and run again"
        ) from None


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def _is_empty(target: Path) -> bool:
    return not target.exists() or not any(target.iterdir())


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new hidden folder in `parent`, and the descriptor whose lock says that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Until it was locked, another command could take it for a leftover.
            if folder.exists():
                return folder, lock
            os.close(lock)


def _swap(folder: Path, target: Path) -> None:
    """Put `folder` in the place of `target`, in one step where the file system has one."""
    if target.is_dir() and _exchange(folder, target):
        _remove_old(folder)
    elif target.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent))
        try:
            target.rename(old / "old")
            try:
                folder.rename(target)
            except BaseException:
                (old / "old").rename(target)
                raise
        except BaseException:
            with contextlib.suppress(OSError):  # not where the old output is still in it
                old.rmdir()
            raise
        _remove_old(old)
    else:
        folder.rename(target)
    _fsync(target.parent)


def _remove_old(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(
            "the new output is in its place, and what was there cannot be removed",
            file=folder,
            found=f"{error.strerror}: {error.filename}",
            remedy="remove it yourself",
        ) from None


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders' names (renameat2); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    at = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    return bool(rename(*at, _RENAME_EXCHANGE) == 0)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _janitor(folder: Path) -> Iterator[None]:
    """A shell that waits for a pipe which only our end, by whatever cause, can close."""
    with subprocess.Popen(
        ["/bin/sh", "-c", 'cat >/dev/null; rm -rf -- "$0"', str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):
        yield


@contextlib.contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the temporary folder is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    raised: list[SystemExit] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        raised.append(SystemExit(128 + signum))
        raise raised[-1]

    def dropped(lost: sys.UnraisableHookArgs) -> None:
        # What is raised while a weak reference or an object ends goes no further: come back later.
        if lost.exc_value in raised:
            threading.Timer(_LATER, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.unraisablehook = hook
