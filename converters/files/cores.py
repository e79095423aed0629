"""The processor cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterable

_bound: list[int] = []


def cores() -> list[int]:
    """Their numbers. Where the system does not tell (macOS), those it was bound to, or all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return _bound or list(range(os.cpu_count() or 1))


def bind(some: Iterable[int]) -> None:
    """Keep this thread, and those that it starts, to `some` cores; where the system cannot do that,
    only `cores` says so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, some)
    else:
        _bound[:] = some
