"""Beam search over one prompt, as transformers' `generate` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_NEVER = -1e9


@dataclass(frozen=True)
class Search:
    """How an encoder-decoder writes. `beams` 1 is greedy.

    `length_penalty`: a finished sequence's log-probability is divided by its length to this power.
    `early_stopping`: stop as soon as there are `beams` finished sequences. `no_repeat_ngram`: no
    sequence of that many tokens comes twice, 0 for no such rule. `ignore_eos`: go on to
    `max_tokens`.
    """

    max_tokens: int = 128
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    min_tokens: int = 0
    no_repeat_ngram: int = 0
    ignore_eos: bool = False


def allowed(
    scores: Array,
    rows: Sequence[list[int]],
    search: Search,
    eos: frozenset[int],
    forced: int | None,
    first: int,
) -> Array:
    """`scores [rows, vocab]` with -inf for what may not follow the tokens of `rows`, of which the
    `first` ones were given."""
    scores = scores.copy()
    if forced is not None:
        scores[:] = -np.inf
        scores[:, forced] = 0
        return scores
    size = search.no_repeat_ngram
    for row, said in zip(scores, rows, strict=True):
        if len(said) - first < search.min_tokens:
            row[list(eos)] = -np.inf
        for i in range(len(said) - size + 1) if size else ():
            if said[i : i + size - 1] == said[len(said) - size + 1 :]:
                row[said[i + size - 1]] = -np.inf
    return scores


class Beams:
    """The sequences of one prompt: `running` ones, of equal length, and the best finished ones."""

    def __init__(self, search: Search, eos: frozenset[int]) -> None:
        self._search, self._eos = search, eos
        self.running: list[list[int]] = [[] for _ in range(search.beams)]
        # All beams begin alike: only one of them counts.
        self._scores = np.array([0.0] + [_NEVER] * (search.beams - 1))
        self._finished: list[tuple[float, list[int]]] = []
        self.done = False

    def advance(self, scores: Array) -> list[int]:
        """Take one step by `scores [beams, vocab]`; the beam each running sequence came from."""
        width, vocab = scores.shape
        total = (scores + self._scores[:, None]).reshape(-1)
        keep = max(2, 1 + len(self._eos)) * width
        best = np.argsort(-total, kind="stable")[:keep]
        length = len(self.running[0]) + 1
        going: list[tuple[float, list[int], int]] = []
        for place, candidate in enumerate(best):
            beam, token = divmod(int(candidate), vocab)
            score, sequence = float(total[candidate]), [*self.running[beam], token]
            if token in self._eos or length == self._search.max_tokens:
                if place < width and not self.done:
                    self._finished.append((score / length**self._search.length_penalty, sequence))
                score += _NEVER
            going.append((score, sequence, beam))
        self._finished = sorted(self._finished, key=lambda each: -each[0])[:width]
        going = sorted(going, key=lambda each: -each[0])[:width]
        self._scores = np.array([score for score, _, _ in going])
        self.running = [sequence for _, sequence, _ in going]
        self.done = self.done or length == self._search.max_tokens or self._cannot_improve(length)
        return [beam for _, _, beam in going]

    def _cannot_improve(self, length: int) -> bool:
        if len(self._finished) < self._search.beams:
            return False
        best = self._scores[0] / length**self._search.length_penalty
        return self._search.early_stopping or bool(best <= self._finished[-1][0])

    def best(self) -> list[int]:
        """The finished sequence of the highest score."""
        return self._finished[0][1]
