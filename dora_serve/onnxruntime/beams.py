"""Beam search over one prompt, as transformers' `generate` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_NEVER = -1e9


@dataclass(frozen=True)
class Search:
    """How an encoder-decoder writes. `beams` 1 is greedy.

    `length_penalty`: a finished sequence's log-probability is divided by its length to this power.
    `early_stopping`: stop as soon as there are `beams` finished sequences; "never": not before none
    that goes on can become better. `no_repeat_ngram`: no sequence of that many tokens comes twice,
    0 for no such rule; `no_read_ngram`: none comes that is in the prompt. `ignore_eos`: go on to
    `max_tokens`.
    """

    max_tokens: int = 128
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    min_tokens: int = 0
    no_repeat_ngram: int = 0
    no_read_ngram: int = 0
    ignore_eos: bool = False


def allowed(
    scores: Array,
    rows: Sequence[list[int]],
    search: Search,
    eos: frozenset[int],
    forced: int | None,
    first: int,
    read: Sequence[Sequence[int]],
) -> Array:
    """`scores [rows, vocab]` with -inf for what may not follow the tokens of `rows`, of which the
    `first` ones were given; `read`: the prompt of each."""
    scores = scores.copy()
    if forced is not None:
        scores[:] = -np.inf
        scores[:, forced] = 0
        return scores
    for row, said, prompt in zip(scores, rows, read, strict=True):
        row[forbidden(said, len(said) - first, prompt, search, eos)] = -np.inf
    return scores


def forbidden(
    said: Sequence[int], new: int, read: Sequence[int], search: Search, eos: frozenset[int]
) -> list[int]:
    """The tokens that `search` lets not follow `said`, whose last `new` ones answer `read`."""
    return [
        *(eos if new < search.min_tokens else ()),
        *_completing(said, said, search.no_repeat_ngram),
        *_completing(read, said, search.no_read_ngram),
    ]


def _completing(known: Sequence[int], said: Sequence[int], size: int) -> list[int]:
    """What would make the end of `said` a sequence of `size` tokens that is in `known`."""
    if not size or len(said) < size - 1:
        return []
    end = [*said[len(said) - size + 1 :]]
    places = range(len(known) - size + 1)
    return [known[i + size - 1] for i in places if [*known[i : i + size - 1]] == end]


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
        search = self._search
        if search.early_stopping == "never" and search.length_penalty > 0:
            length = search.max_tokens
        best = self._scores[0] / length**search.length_penalty
        return search.early_stopping is True or bool(best <= self._finished[-1][0])

    def best(self) -> list[int]:
        """The finished sequence of the highest score."""
        return self._finished[0][1]
