"""The next token of every row of a batch, from its logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .session import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .beams import Search
    from .grammar import Grammar

    Logits = NDArray[np.float32]

_COLDEST = 0.01  # temperatures between it and 0 are raised to it, as in vLLM: else scores overflow
_NUCLEUS = 1024  # tokens; few draws need more, and sorting a whole vocabulary costs milliseconds


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn. `temperature` 0 is greedy; `seed` makes a draw repeatable.

    `stop`: texts that end a completion and are cut off. `logprobs`: how many of the likeliest
    tokens to tell at every step, None for no log-probabilities. `top_k` 0, `top_p` 1 and `min_p` 0
    bound nothing. `min_tokens`: before so many, nothing but `max_tokens` ends it. `ignore_eos`: go
    on to `max_tokens`.

    `stop_token_ids`: tokens that end it too. `include_stop_str_in_output`: what ends it is part of
    the text. `allowed_token_ids`: no others are drawn; empty for all. `bad_words`: sequences of
    tokens that are not completed. `logit_bias`: tokens and what is added to their logits.
    `marks`: special tokens that are told all the same, where others are skipped.
    `repetition_penalty` of what the prompt or the completion says, `presence_penalty` and
    `frequency_penalty` of what the completion says, as OpenAI defines them. `prompt_logprobs`: as
    `logprobs`, of the prompt's own tokens. `grammar`: what the completion has to follow. `search`:
    what an encoder-decoder's configuration has its answers heed, and with more beams than one how
    they are found in the place of drawing them.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    marks: tuple[str, ...] = ()
    spaces_between_special_tokens: bool = True
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    search: Search | None = None

    @property
    def named_tokens(self) -> Iterable[int]:
        """The token ids that are given."""
        biased = (token for token, _ in self.logit_bias)
        return itertools.chain(self.stop_token_ids, self.allowed_token_ids, biased)


def check_finite(logits: Logits) -> None:
    """Raise `EngineError` where a row's largest logit is NaN or infinite; others may be -inf."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise EngineError(
            "the logits are not finite",
            remedy="the run diverged, or its numbers are too large: use another",
        )


def log_softmax(logits: Logits) -> Logits:
    """Natural log-probabilities along the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def likeliest(scores: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """The indices of the `count` largest of `scores [vocab]`, largest first, ties by index."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    smallest = np.partition(scores, len(scores) - count)[len(scores) - count] if count else np.inf
    candidates = np.flatnonzero(scores >= smallest)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


def distribution(
    logits: Logits, sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that may be drawn from `logits [vocab]`, and their probabilities: of those at
    least `min_p` times as likely as the likeliest, the `top_k` likeliest, and of these the fewest
    whose probabilities sum to `top_p`."""
    scores = logits.astype(np.float64) / max(sampling.temperature, _COLDEST)
    probabilities = np.exp(scores - scores.max())
    probabilities[probabilities < sampling.min_p] = 0
    probabilities /= probabilities.sum()
    if sampling.top_p == 1 and not sampling.top_k:
        return np.arange(len(probabilities)), probabilities
    order = likeliest(probabilities, sampling.top_k or _NUCLEUS)
    if not sampling.top_k and probabilities[order].sum() < sampling.top_p:
        order = likeliest(probabilities, len(probabilities))
    probabilities = probabilities[order] / (probabilities[order].sum() if sampling.top_k else 1)
    before = np.cumsum(probabilities) - probabilities
    kept = before < sampling.top_p
    return order[kept], probabilities[kept] / probabilities[kept].sum()


def draw(logits: Logits, sampling: Sampling, generator: np.random.Generator) -> int:
    """One token of `logits [vocab]`: the largest at temperature 0, else a draw."""
    check_finite(logits)
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens, probabilities = distribution(logits, sampling)
    return int(generator.choice(tokens, p=probabilities))
