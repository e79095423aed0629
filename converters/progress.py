"""How far long work is, for a person who waits. Nobody is told unless `show` says how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int], None]  # told the bytes just done, from any thread
Bars = Callable[[int, str], AbstractContextManager[Progress]]


@contextmanager
def _unseen(_total: int, _text: str) -> Iterator[Progress]:
    yield lambda _count: None


_bars: Bars = _unseen


def show(bars: Bars) -> None:
    """From now on, in this process, have `bars(total bytes, text)` open a bar for what is long."""
    global _bars
    _bars = bars


def shown(total: int, text: str) -> AbstractContextManager[Progress]:
    """A bar for `total` bytes of what `text` says."""
    return _bars(total, text)
