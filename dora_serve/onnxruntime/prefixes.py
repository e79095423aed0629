"""Keys and values of what was computed before, for requests that begin with the same tokens.

They are copied out of a slot and into another: a copy takes a hundredth of the time in which they
would be computed, and slots stay free to be moved, overwritten and resized.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from .slots import BLOCK, Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Prefixes:
    """Blocks of tokens computed in `slots`, at most `max_bytes` of them; the least recently used
    are forgotten first. The memory is taken as it is filled.

    A block is known by the digest of all that its keys and values follow from: its own tokens, all
    before them, and the `kind` of their row, which says what computed them.

    `queries`: tokens that were looked for so far. `hits`: those that were found.
    """

    def __init__(self, slots: Slots, max_bytes: int) -> None:
        self._slots = slots
        self._room = max_bytes // (BLOCK * slots.token_bytes)
        caches = list(slots.blocks(0, 0, 0))
        # Of one block all caches together, so that few pages of memory are new when it is kept.
        shape, kind = (self._room, len(caches), *caches[0].shape[1:]), caches[0].dtype
        size = max(1, self._room * BLOCK * slots.token_bytes)
        # numpy asks for huge pages, which take longer than the copy where memory is scattered.
        memory = np.ndarray(shape, kind, mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._blocks: list[NDArray[Any]] = [*memory.swapaxes(0, 1)]
        self._places: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self.queries = self.hits = 0

    @property
    def kept(self) -> bool:
        """Whether there is room for any."""
        return self._room > 0

    def load(self, kind: bytes, tokens: Sequence[int], slot: int) -> int:
        """Put what is kept of the first of `tokens`, but never the last of them, into `slot`, which
        has room for all; how many tokens these are."""
        known: list[bytes] = []
        for digest in _digests(kind, tokens[:-1]):
            if digest not in self._places:
                break
            known.append(digest)
        self._use(known)
        places = _span([self._places[digest] for digest in known])
        for target, blocks in zip(
            self._slots.blocks(slot, 0, len(known)), self._blocks, strict=True
        ):
            target[...] = blocks[places]
        self.queries += len(tokens)
        self.hits += BLOCK * len(known)
        return BLOCK * len(known)

    def keep(self, kind: bytes, tokens: Sequence[int], slot: int) -> None:
        """Keep what `slot` holds of `tokens`, as far as whole blocks of them go."""
        digests = list(_digests(kind, tokens))[: self._room]
        new = [i for i, digest in enumerate(digests) if digest not in self._places]
        if new:
            self._use([digest for digest in digests if digest in self._places])
            places = _span([self._place(digests[i]) for i in new])
            first = new[0]  # once one is missing, those behind it are mostly missing too
            held = self._slots.blocks(slot, first, len(digests))
            taken = _span([i - first for i in new])
            for blocks, source in zip(self._blocks, held, strict=True):
                blocks[places] = source[taken]
        self._use(digests)

    def _use(self, digests: Sequence[bytes]) -> None:
        for digest in reversed(digests):  # so that the last of a text is forgotten first
            self._places.move_to_end(digest)

    def _place(self, digest: bytes) -> int:
        taken = len(self._places)
        place = taken if taken < self._room else self._places.popitem(last=False)[1]
        self._places[digest] = place
        return place


def _span(numbers: list[int]) -> list[int] | slice:
    """The numbers as a slice where each follows the last, of which numpy makes no copy."""
    if not numbers or numbers != [*range(numbers[0], numbers[0] + len(numbers))]:
        return numbers
    return slice(numbers[0], numbers[0] + len(numbers))


def _digests(kind: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
    """Of every whole block."""
    digest = kind
    for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
        block = np.array(tokens[begin : begin + BLOCK], np.int64)
        digest = sha256(digest + block.tobytes()).digest()
        yield digest
