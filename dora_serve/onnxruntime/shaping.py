"""What a request asks of its logits before a token is drawn, in vLLM's order: which tokens are
allowed, which words are not, what may not end it yet, biases, and penalties for what was said."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .sampling import Sampling
from .session import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sampling import Logits


class Shaping:
    """Of one completion of `prompt`, which any token of `ends` ends."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: frozenset[int]) -> None:
        self._sampling = sampling
        self._prompt = prompt
        self._end_ids = ends | set(sampling.stop_token_ids)
        self._penalizes = (
            sampling.repetition_penalty != 1
            or sampling.frequency_penalty != 0
            or sampling.presence_penalty != 0
        )
        self._counts: NDArray[np.int32] | None = None  # of tokens written, once it is needed
        self._asked: NDArray[np.bool_] | None = None  # tokens of the prompt
        self._counted = 0

    def __call__(self, logits: Logits, written: Sequence[int]) -> Logits:
        """`logits [vocab]` as they are drawn from, behind the tokens `written`; the argument stays
        as it is. Raises `EngineError` when no token is left."""
        sampling = self._sampling
        early = len(written) < sampling.min_tokens and bool(self._end_ids)
        forbidden = self._forbidden(written)
        if not (
            early
            or forbidden
            or sampling.allowed_token_ids
            or sampling.logit_bias
            or self._penalizes
        ):
            return logits
        shaped = logits.copy()
        if sampling.allowed_token_ids:
            shaped[:] = -np.inf
            shaped[self._allowed] = logits[self._allowed]
        shaped[forbidden] = -np.inf
        if early:
            shaped[self._ends] = -np.inf
        if sampling.logit_bias:
            np.add.at(shaped, *self._biases)
        if self._penalizes:
            self._penalize(shaped, written)
        if not np.isfinite(shaped.max()):
            raise EngineError(
                "no token is left to draw", remedy="allow more tokens, or forbid fewer words"
            )
        return shaped

    # Made with the first token: rows that wait need none of it.

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.array(sorted(self._end_ids), np.int64)

    @cached_property
    def _allowed(self) -> NDArray[np.int64]:
        return np.array(self._sampling.allowed_token_ids, np.int64)

    @cached_property
    def _biases(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        tokens, biases = zip(*self._sampling.logit_bias, strict=True)
        return np.array(tokens, np.int64), np.array(biases, np.float32)

    def _forbidden(self, written: Sequence[int]) -> list[int]:
        """The tokens that would complete a word that may not be."""
        return [
            word[-1]
            for word in self._sampling.bad_words
            if len(word) == 1 or tuple(written[1 - len(word) :]) == word[:-1]
        ]

    def _penalize(self, shaped: Logits, written: Sequence[int]) -> None:
        sampling = self._sampling
        if self._counts is None or self._asked is None:
            self._counts = np.zeros(len(shaped), np.int32)
            self._asked = np.zeros(len(shaped), np.bool_)
            self._asked[self._prompt] = True
        np.add.at(self._counts, written[self._counted :], 1)
        self._counted = len(written)
        if sampling.repetition_penalty != 1:
            seen = np.flatnonzero(self._asked | (self._counts > 0))
            penalty = np.float32(sampling.repetition_penalty)
            values = shaped[seen]
            shaped[seen] = np.where(values > 0, values / penalty, values * penalty)
        said = np.flatnonzero(self._counts)
        shaped[said] -= np.float32(sampling.frequency_penalty) * self._counts[said]
        shaped[said] -= np.float32(sampling.presence_penalty)
