"""What drawing a token and ending a completion mean, written as plainly as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_serve.onnxruntime.sampling import Sampling


def ranked(chances: Sequence[float]) -> list[int]:
    """The tokens, likeliest first, the smaller of two that are equally likely first."""
    return sorted(range(len(chances)), key=lambda token: (-chances[token], token))


def distribution(
    logits: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """The probability `[vocab]` of every token: softmax of logits / temperature, of that the tokens
    at least `min_p` times as likely as the likeliest, of those the `top_k` likeliest, of those the
    fewest whose probabilities reach `top_p`."""
    values = np.array(logits, np.float64) / temperature
    chances = np.exp(values - values.max())
    kept = [token for token in ranked(list(chances)) if chances[token] >= min_p]
    kept = kept[: top_k or len(kept)]
    whole = sum(chances[token] for token in kept)
    reached, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        reached += chances[token] / whole
        if reached >= top_p:
            break
    wanted = np.zeros(len(chances))
    wanted[nucleus] = chances[nucleus]
    result: NDArray[np.float64] = wanted / wanted.sum()
    return result


def stopped_at(text: str, stops: Sequence[str], before: int = 0) -> int | None:
    """Where the stop text begins that is whole first of those that end behind the first `before`
    characters, of several the one that is named first, as in vLLM."""
    for end in range(before + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop)
    return None


class Bytes:
    """A tokenizer whose tokens are the bytes of a text."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def completed(
    likeliest: Sequence[Sequence[int]], sampling: Sampling, eos: frozenset[int], room: int
) -> tuple[list[int], str, str]:
    """Tokens, text and reason of a greedy completion of ASCII bytes; `likeliest`: the tokens at
    every step, best first."""
    tokens: list[int] = []
    for order in likeliest:
        early = len(tokens) < sampling.min_tokens
        token = next(each for each in order if not (early and each in eos))
        if token in eos and not sampling.ignore_eos:
            return tokens, bytes(tokens).decode(), "stop"
        tokens.append(token)
        text = bytes(tokens).decode()
        at = None if early else stopped_at(text, sampling.stop, len(text) - 1)
        if at is not None:
            return tokens, text[:at], "stop"
        if len(tokens) == min(sampling.max_tokens, room):
            return tokens, text, "length"
    raise AssertionError("too few steps")
