"""The memory that this process may use."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_BOUNDS = {"": "memory.max", "memory": "memory/memory.limit_in_bytes"}  # of cgroups v2 and v1


def memory() -> int:
    """Its bytes: the machine's, or what is given to it (`ulimit -v`) or to one of the control
    groups that it is in."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    own = machine if own == resource.RLIM_INFINITY else own
    return min([machine, own, *_given(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _given(own: Path, root: Path) -> Iterator[int]:
    """The bounds of the control groups that the file `own` names below `root`, and of those above
    them. In a container `own` may name them as its host does: what is given lies at `root` then."""
    lines: list[str] = []
    with suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:
        _, kinds, place = line.split(":", 2)
        for kind in _BOUNDS.keys() & kinds.split(","):
            folder, _, name = f"{root}/{_BOUNDS[kind]}".rpartition("/")
            path = Path(folder, os.path.normpath(place).lstrip("/"))
            for group in (path, *path.parents):
                if group.is_relative_to(folder):
                    with suppress(OSError, ValueError):  # none, or "max"
                        yield int((group / name).read_text())
