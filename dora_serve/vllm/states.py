"""What tells a run that lies in a folder from what it was at the look before."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

State = Mapping[str, tuple[int, ...]]

_TIMES = 4  # numbers of a file's state, the last of which is when it changed
_SECOND = 1_000_000_000  # nanoseconds
_COARSE = 2.0  # seconds, as FAT counts them


def state_below(path: Path) -> State:
    """What tells whether a file or a folder is still the same; empty when it is not there."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        for file in (path, *path.rglob("*")):
            try:
                one = file.stat()
            except FileNotFoundError:
                continue
            except OSError as error:  # of this one, such as a link to itself
                found[str(file)] = (error.errno or 0,)
                continue
            found[str(file)] = (one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns)
            if file is path and stat.S_ISDIR(one.st_mode):
                found[str(file)] = (one.st_dev, one.st_ino)
    except OSError as error:
        found[str(path)] = (error.errno or 0,)
    return found


def blind(state: State) -> float:
    """Seconds after a change in which another one may not show: where times are whole seconds, as
    some file systems keep them."""
    times = [one[-1] for one in state.values() if len(one) == _TIMES]
    return _COARSE if any(time % _SECOND == 0 for time in times) else 0.0
