"""Files that are read in pieces: which kind they are, and whether they stay the same."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from ..errors import DoraExportError, MissingError, TensorFileError

State = tuple[int, ...]

OF_THE_DISK = "lost+found"  # which root alone may read, at the top of many a disk

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: what a clone without Git LFS leaves
_POINTER, _LARGEST_POINTER = b"version https://git-lfs.github.com/spec/v1\n", 1024


def state_of(found: os.stat_result) -> State:
    """What tells whether a file is still the same: device, inode, size, both times of change. Who
    writes over a file may give it any `st_mtime`, as `cp -p` and archives do, and no `st_ctime`."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def state_at(path: Path) -> State | None:
    """The state of what lies at `path`, None where there is nothing that can be looked at."""
    try:
        return state_of(path.stat())
    except OSError:
        return None


def there(path: Path) -> bool:
    """Whether something is at `path`, which may be no possible path at all."""
    try:
        return path.exists()
    except OSError:
        return False


def real(path: Path) -> Path:
    """Where `path` leads, itself where that is nowhere: a link to itself is no error."""
    return Path(os.path.realpath(path))


def tells_case_apart(folder: Path) -> bool:
    """Whether `a` and `A` are two files in `folder`, which need not be there: as what lies in it or
    above it shows, so that nothing is written. Not so by default on macOS and Windows."""
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    with suppress(OSError):
        for path in chain(place.iterdir(), (place, *place.parents)):
            other = path.with_name(path.name.swapcase()) if path.name else path
            if other != path:
                return not (there(other) and path.samefile(other))
    return True


def check_there(path: Path) -> None:
    """Raise `MissingError` where nothing is at `path`."""
    if not there(path):
        raise MissingError("there is no such path", file=path)


def check_file(path: Path) -> int:
    """The size of the file `path`. Raises `MissingError` where there is none, `TensorFileError` for
    what is no file, since reading a pipe or device might never end, and for a pointer of Git LFS,
    which is small, ends well, and is not what its name says."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise MissingError("file not found", file=path) from None
    except OSError as error:
        raise TensorFileError(f"cannot be read: {error.strerror}", file=path) from None
    if not stat.S_ISREG(found.st_mode):
        raise TensorFileError("cannot be read: not a file", file=path)
    if 0 < found.st_size <= _LARGEST_POINTER and _is_pointer(path):
        raise TensorFileError(
            "a Git LFS pointer, not the file itself",
            file=path,
            remedy="fetch it: git lfs pull, in its repository, where Git LFS is installed",
        )
    return found.st_size


def _is_pointer(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as stream:  # who reads it tells why it cannot be
        return stream.read(len(_POINTER)) == _POINTER
    return False


def mounts() -> list[Path]:
    """Where file systems are mounted, as far as the system tells (proc(5), mountinfo)."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return [Path("/")]
    places = (line.split(" ")[4] for line in lines)
    return [Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), p)) for p in places]


@contextmanager
def reading(path: Path, kind: type[DoraExportError]) -> Iterator[None]:
    """Turn what the system says while the folder `path` is read into an error of this `kind`: it
    may not be read, or is being exchanged."""
    try:
        yield
    except DoraExportError:
        raise
    except OSError as error:
        raise kind(f"cannot be read: {error.strerror}", file=error.filename or path) from None


def paths_below(folder: Path) -> list[Path]:
    """What lies below `folder`, in order of names; links are not followed. Raises `TensorFileError`
    where a folder cannot be listed or entered, of which `Path.rglob` says nothing, so that its
    files would count as none; but for that which a file system keeps at its top for itself."""
    found: list[Path] = []
    unread: list[OSError] = []
    with reading(folder, TensorFileError):
        for place, below, files in os.walk(folder, onerror=unread.append):
            found += (Path(place, name) for name in (*below, *files))
        for error in unread:
            if Path(error.filename) != folder / OF_THE_DISK:
                raise error
        for path in found:
            path.lstat()
    return sorted(found)


@contextmanager
def opened(path: Path, state: State, tensor: str | None = None) -> Iterator[int]:
    """The descriptor of a file to read from. Raises `TensorFileError` when it cannot be opened, or
    on leaving is not in `state`: what was read may then be of two files."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise TensorFileError(
            f"cannot be opened: {error.strerror}", file=path, tensor=tensor
        ) from None
    try:
        yield fd
        same = state_of(os.fstat(fd)) == state
    finally:
        os.close(fd)
    if not same:
        raise TensorFileError(
            "the file was changed while it was read",
            file=path,
            tensor=tensor,
            remedy="run again when nothing writes to it",
        )
