"""What a request asks of its logits before a token is drawn, in vLLM's order: which tokens are
allowed, which words are not, what may not end it yet, biases, and penalties for what was said."""

from __future__ import annotations

from collections.abc import Sequence
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
        self._ends = np.array(sorted(ends | set(sampling.stop_token_ids)), np.int64)
        self._allowed = np.array(sampling.allowed_token_ids, np.int64)
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in sampling.logit_bias], np.float32)
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
        early = len(written) < self._sampling.min_tokens and len(self._ends) > 0
        forbidden = self._forbidden(written)
        if not (early or forbidden or len(self._allowed) or len(self._biased) or self._penalizes):
            return logits
        shaped = logits.copy()
        if len(self._allowed):
            shaped[:] = -np.inf
            shaped[self._allowed] = logits[self._allowed]
        shaped[forbidden] = -np.inf
        if early:
            shaped[self._ends] = -np.inf
        np.add.at(shaped, self._biased, self._biases)
        if self._penalizes:
            self._penalize(shaped, written)
        if not np.isfinite(shaped.max()):
            raise EngineError(
                "no token is left to draw", remedy="allow more tokens, or forbid fewer words"
            )
        return shaped

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
