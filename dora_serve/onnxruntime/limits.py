"""What the engines refuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt

from converters.files.memory import memory

from .session import EngineError

_SCORES = 1 << 23  # numbers, of each token with each other in a layer; there are copies of them
_STATES = 1 << 23  # numbers, of all tokens between the two layers of a block; copies as well
_SCORE_BYTES = 12  # that were taken for each, with its copies: 9 to 11
_ALWAYS = 1024  # tokens that a row may have in any case: with 16 heads they take 200 MB
_HEADS = ("num_attention_heads", "encoder_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("intermediate_size", "encoder_ffn_dim", "d_ff", "hidden_dim")


class QueueFull(EngineError):
    """More requests wait than are allowed to."""


@dataclass(frozen=True)
class Limits:
    """`max_rows` at once, `max_waiting` behind them, bytes of keys and values, bytes of adapters,
    and `piece`: tokens of a prompt between two steps. `prefix_bytes` of keys and values that are
    kept for later requests of one engine, by default a sixteenth of the memory. `row_bytes` that
    the attention of one row may take where every token is compared with every other at once, by
    default an eighth."""

    max_rows: int = 32
    max_waiting: int = 256
    cache_bytes: int = 1 << 30
    adapter_bytes: int = 1 << 30
    prefix_bytes: int = field(default_factory=lambda: memory() // 16)
    row_bytes: int = field(default_factory=lambda: memory() // 8)
    piece: int = 64


def takes_much(rows: int, longest: int, config: Mapping[str, object]) -> bool:
    """Whether so many rows of such a length take much memory at once in an encoder of `config`:
    it grows with the square of their length, and with the width of its layers."""

    scores = rows * _said(config, _HEADS, 16) * longest**2
    return scores > _SCORES or rows * _said(config, _WIDTHS, 4096) * longest > _STATES


def lone(rows: Sequence[Sequence[int]], config: Mapping[str, object]) -> bool:
    """Whether `rows` are one that takes much: of the lengths that clients choose, few come again,
    and what each took would be kept beside what the others did."""
    return len(rows) == 1 and takes_much(1, len(rows[0]), config)


def longest_row(room: int, config: Mapping[str, object]) -> int:
    """How many tokens a row of an encoder of `config` may have whose scores take `room` bytes."""
    heads = max(1, _said(config, _HEADS, 16))
    return max(_ALWAYS, isqrt(room // (_SCORE_BYTES * heads)))


def _said(config: Mapping[str, object], names: Sequence[str], else_: int) -> int:
    return next((n for name in names if isinstance(n := config.get(name), int)), else_)


def check_rows(rows: Sequence[Sequence[int]], longest: int, vocabulary: int | None = None) -> None:
    """Raise `EngineError` for no rows, a row that is empty or has more than `longest` tokens, and
    for a token id that a model of `vocabulary` tokens does not have."""
    lengths = [len(row) for row in rows] or [0]
    if not min(lengths) or max(lengths) > longest:
        raise EngineError(
            "a prompt is empty or too long",
            found=f"{min(lengths)} to {max(lengths)} tokens",
            expected=f"1 to {longest}",
        )
    if vocabulary is not None:
        check_tokens((token for row in rows for token in row), vocabulary)


def check_tokens(tokens: Iterable[int], vocabulary: int) -> None:
    """Raise `EngineError` for a token id that a model of `vocabulary` tokens does not have."""
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise EngineError("no such token", found=wrong[0], expected=f"0 to {vocabulary - 1}")
