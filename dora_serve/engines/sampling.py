"""The next token of every row of a batch, from its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn. `temperature` 0 is greedy; `seed` makes a draw repeatable.

    `stop`: texts that end a completion and are cut off. `logprobs`: how many of the likeliest
    tokens to tell at every step, None for no log-probabilities. `ignore_eos`: go on to
    `max_tokens`.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


def log_softmax(logits: Logits) -> Logits:
    """Natural log-probabilities along the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def draw(logits: Logits, sampling: Sampling, generator: np.random.Generator) -> int:
    """One token of `logits [vocab]`: the largest, or a draw from the smallest set of tokens whose
    probabilities sum to `top_p`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < sampling.top_p]
    return int(generator.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
