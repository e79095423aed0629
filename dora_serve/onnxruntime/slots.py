"""The key and value cache of a continuous batch: one slot per row, the rows in use in front.

A graph with GroupQueryAttention writes into the memory that it is given, `[rows, heads, length,
head_size]`, so that the first n slots are a batch without a copy, and slot n alone is one too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .decoder_graph import DecoderGraph

BLOCK = 16  # tokens that are kept and found together, as many as in vLLM
_STEP = 64  # tokens: what a length is rounded up to


class Slots:
    """The caches of `graph` with at most `max_rows` slots and `max_bytes` in all. It begins empty
    and grows as far as rows need it. `version` changes whenever the memory does."""

    def __init__(self, graph: DecoderGraph, max_rows: int, max_bytes: int) -> None:
        self._heads, self._head_size = graph.heads, graph.head_size
        self._dtype: np.dtype[Any] = np.dtype(graph.cache_type)
        self.token_bytes = len(graph.cache) * graph.heads * graph.head_size * self._dtype.itemsize
        self.max_bytes = max_bytes
        self.max_length = min(graph.max_length, max_bytes // self.token_bytes)
        self.max_rows = max_rows
        self.rows = self.length = self.version = 0
        self._arrays = [self._empty(0, 0) for _ in graph.cache]

    def _empty(self, rows: int, length: int) -> NDArray[Any]:
        return np.zeros((rows, self._heads, length, self._head_size), self._dtype)

    def fits(self, rows: int, length: int) -> bool:
        """Whether so many slots of that length could be had."""
        size = rows * self._rounded(length) * self.token_bytes
        return rows <= self.max_rows and length <= self.max_length and size <= self.max_bytes

    def _rounded(self, length: int) -> int:
        return min(-(-length // _STEP) * _STEP, self.max_length)

    def reserve(self, rows: int, length: int, used: int) -> bool:
        """Have at least `rows` slots of `length`, keeping the first `used` tokens of every slot;
        False, and nothing changed, when they do not fit."""
        if rows <= self.rows and length <= self.length:
            return True
        if not self.fits(rows, length):
            return False
        generous = max(self.rows, 1 << (rows - 1).bit_length()), max(self.length, 2 * length)
        generous = min(generous[0], self.max_rows), min(generous[1], self.max_length)
        if not self.fits(*generous):
            generous = rows, length
        self._resize(generous[0], self._rounded(generous[1]), used)
        return True

    def _resize(self, rows: int, length: int, used: int) -> None:
        kept = min(rows, self.rows)
        for i, old in enumerate(self._arrays):
            self._arrays[i] = self._empty(rows, length)
            self._arrays[i][:kept, :, :used] = old[:kept, :, :used]
        self.rows, self.length = rows, length
        self.version += 1

    def move(self, source: int, target: int, used: int) -> None:
        """Put the first `used` tokens of slot `source` into slot `target`."""
        for array in self._arrays:
            array[target, :, :used] = array[source, :, :used]

    def blocks(self, slot: int, begin: int, end: int) -> Iterator[NDArray[Any]]:
        """The blocks of tokens from `begin` to `end` of a slot, `[blocks, heads, BLOCK, head_size]`
        of every cache, in its own memory."""
        for array in self._arrays:
            tokens = array[slot : slot + 1, :, begin * BLOCK : end * BLOCK]
            shape = self._heads, end - begin, BLOCK, self._head_size
            yield tokens.reshape(shape).swapaxes(0, 1)

    def view(self, begin: int, end: int) -> list[Any]:
        """The slots from `begin` to `end` of every cache, as OrtValues over the same memory."""
        from onnxruntime import OrtValue

        return [OrtValue.ortvalue_from_numpy(array[begin:end]) for array in self._arrays]
