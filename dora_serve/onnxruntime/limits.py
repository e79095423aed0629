"""What the engines that many ask at once refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .session import EngineError


class QueueFull(EngineError):
    """More requests wait than are allowed to."""


@dataclass(frozen=True)
class Limits:
    """`max_rows` at once, `max_waiting` behind them, bytes of keys and values, bytes of adapters,
    and `piece`: tokens of a prompt between two steps."""

    max_rows: int = 32
    max_waiting: int = 256
    cache_bytes: int = 1 << 30
    adapter_bytes: int = 1 << 30
    piece: int = 64


def check_vocabulary(ids: Sequence[int], size: int) -> None:
    """Raise `EngineError` for a token id that a model of `size` tokens does not have."""
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise EngineError("no such token", found=wrong, expected=f"0 to {size - 1}")
