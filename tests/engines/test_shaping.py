"""Logits are shaped as a plain reference shapes them, in vLLM's order; those that are told stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.onnxruntime.session import EngineError
from dora_serve.onnxruntime.shaping import Shaping

QUICK = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SIZE = 8
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=6)
PENALTY = st.sampled_from([0.0, 0.5, -1.25, 2.0])


def reference(
    logits: list[float], sampling: Sampling, prompt: list[int], ends: set[int], written: list[int]
) -> list[float]:
    """One token after the other."""
    counts, shaped = Counter(written), []
    for token, value in enumerate(logits):
        if sampling.allowed_token_ids and token not in sampling.allowed_token_ids:
            value = -np.inf
        for word in sampling.bad_words:
            behind = [*written, token]
            if len(behind) >= len(word) and tuple(behind[-len(word) :]) == word:
                value = -np.inf
        if len(written) < sampling.min_tokens and token in ends | set(sampling.stop_token_ids):
            value = -np.inf
        value += sum(bias for each, bias in sampling.logit_bias if each == token)
        if token in prompt or counts[token]:
            penalty = sampling.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        value -= sampling.frequency_penalty * counts[token]
        value -= sampling.presence_penalty * (counts[token] > 0)
        shaped.append(value)
    return shaped


@QUICK
@given(
    logits=st.lists(st.integers(-6, 6), min_size=SIZE, max_size=SIZE),
    prompt=TOKENS.filter(bool),
    written=TOKENS,
    allowed=TOKENS,
    words=st.lists(TOKENS.filter(bool), max_size=3),
    stops=TOKENS,
    least=st.integers(0, 5),
    biases=st.dictionaries(st.integers(0, SIZE - 1), st.sampled_from([-100.0, 1.5]), max_size=3),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    presence=PENALTY,
    frequency=PENALTY,
)
def test_as_the_reference(
    logits: list[int],
    prompt: list[int],
    written: list[int],
    allowed: list[int],
    words: list[list[int]],
    stops: list[int],
    least: int,
    biases: dict[int, float],
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    sampling = Sampling(
        allowed_token_ids=tuple(allowed),
        bad_words=tuple(map(tuple, words)),
        stop_token_ids=tuple(stops),
        min_tokens=least,
        logit_bias=tuple(biases.items()),
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    given = np.array(logits, np.float32)
    shape = Shaping(sampling, prompt, frozenset({0}))
    expected = reference(list(map(float, logits)), sampling, prompt, {0}, written)
    if max(expected) == -np.inf:
        with pytest.raises(EngineError, match="no token is left"):
            shape(given, written)
        return
    for seen in range(len(written)):  # what was written is counted as it comes
        try:
            shape(given, written[:seen])
        except EngineError:
            continue
    assert np.allclose(shape(given, written), expected, atol=1e-5)
    assert given.tolist() == logits


def test_what_is_not_asked_for_costs_no_copy() -> None:
    logits = np.zeros(SIZE, np.float32)
    assert Shaping(Sampling(), [1], frozenset({0}))(logits, [1, 2]) is logits


@pytest.mark.parametrize("written", [[1, 2], [2, 1, 2], [2], [2, 2], [1, 3], []])
def test_a_bad_word_of_three_tokens_ends_nowhere_else(written: list[int]) -> None:
    shape = Shaping(Sampling(bad_words=((1, 2, 3),)), [1, 2], frozenset({0}))
    forbidden = np.flatnonzero(shape(np.zeros(SIZE, np.float32), written) == -np.inf)
    assert forbidden.tolist() == ([3] if written[-2:] == [1, 2] else [])
