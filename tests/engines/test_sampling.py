"""Tokens are drawn from the distribution that a plain reference gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_serve.onnxruntime.sampling import (
    Sampling,
    check_finite,
    distribution,
    draw,
    likeliest,
    log_softmax,
)
from tests.engines import reference

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)
# Few values, so that many are equal; none so near that a sum decides by its last bit.
LOGITS = st.lists(st.integers(-6, 6), min_size=1, max_size=12)


def found(logits: list[float], sampling: Sampling) -> np.ndarray:
    tokens, chances = distribution(np.array(logits, np.float32), sampling)
    wanted = np.zeros(len(logits))
    wanted[tokens] = chances
    return wanted


@QUICK
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.0317, 0.2593, 0.5171, 0.7391, 0.9043, 0.9871, 1.0]),
    min_p=st.sampled_from([0.0, 0.0113, 0.1217, 0.4391, 1.0]),
)
def test_as_the_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = reference.distribution(logits, temperature, top_k, top_p, min_p)
    assert np.allclose(found(logits, sampling), expected, atol=1e-12)


HALVES = [float(x) for x in np.log2([0.5, 0.25, 0.125, 0.125]) * np.log(2)]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, 1), (0.5001, 2), (0.75, 2), (0.7501, 3), (0.8751, 4), (1e-9, 1)]
)
def test_the_fewest_tokens_that_reach_top_p(top_p: float, kept: int) -> None:
    tokens, _ = distribution(np.array(HALVES, np.float32), Sampling(temperature=1, top_p=top_p))
    assert list(tokens) == list(range(kept))


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_sum_of_exactly_top_p_is_enough(top_p: float, kept: int) -> None:
    tokens, _ = distribution(np.zeros(4, np.float32), Sampling(temperature=1, top_p=top_p))
    assert list(tokens) == list(range(kept))


@pytest.mark.parametrize(("top_k", "kept"), [(1, [0]), (2, [0]), (3, [0, 1]), (4, [0, 1])])
def test_top_p_is_of_what_top_k_left(top_k: int, kept: list[int]) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    tokens, _ = distribution(logits, Sampling(temperature=1, top_k=top_k, top_p=0.6))
    assert list(tokens) == kept


@pytest.mark.parametrize("size", [1023, 1024, 1025, 4000])
def test_a_nucleus_of_many_tokens(size: int) -> None:
    sampling = Sampling(temperature=1, top_p=0.99003)
    tokens, chances = distribution(np.zeros(size, np.float32), sampling)
    assert len(tokens) == int(np.ceil(0.99003 * size))
    assert chances == pytest.approx(np.full(len(tokens), 1 / len(tokens)))


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.24, 4), (0.26, 2), (0.51, 1), (1.0, 1)])
def test_min_p_is_a_share_of_the_likeliest(min_p: float, kept: int) -> None:
    chances = found(HALVES, Sampling(temperature=1, min_p=min_p))
    assert int((chances > 0).sum()) == kept


def test_temperature_zero_is_the_first_of_the_largest_and_draws_nothing() -> None:
    generator = np.random.default_rng(0)
    before = generator.bit_generator.state
    logits = np.array([1, 3, -np.inf, 3], np.float32)
    assert draw(logits, Sampling(), generator) == 1
    assert generator.bit_generator.state == before


@pytest.mark.parametrize("temperature", [1e-300, 0.005, 0.01])
def test_the_coldest_temperature(temperature: float) -> None:
    expected = reference.distribution([0, 0.01], 0.01, 0, 1, 0)
    assert np.allclose(found([0, 0.01], Sampling(temperature=temperature)), expected, atol=1e-6)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))[[3, 0, 2, 1]]
    sampling = Sampling(temperature=1, top_p=0.9)
    draws = [
        [draw(logits, sampling, generator) for _ in range(1500)]
        for generator in map(np.random.default_rng, (1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]
    shares = np.bincount(draws[0], minlength=4) / 1500
    expected = reference.distribution(list(map(float, logits)), 1, 0, 0.9, 0)
    assert list(np.flatnonzero(shares)) == [1, 2, 3]
    assert np.abs(shares - expected).max() < 0.05


@QUICK
@given(scores=LOGITS, count=st.integers(0, 14))
def test_likeliest(scores: list[float], count: int) -> None:
    assert list(likeliest(np.array(scores, np.float32), count)) == reference.ranked(scores)[:count]


@QUICK
@given(logits=LOGITS, shift=st.sampled_from([0.0, 500.0, -500.0]))
def test_log_softmax(logits: list[float], shift: float) -> None:
    expected = np.log(reference.distribution(logits, 1, 0, 1, 0))
    both = np.array([logits, logits[::-1]], np.float32) + np.float32(shift)
    assert np.allclose(log_softmax(both), [expected, expected[::-1]], atol=1e-4)


@pytest.mark.parametrize(
    ("row", "fine"),
    [
        ([0, 1], True),
        ([-np.inf, 1], True),
        ([np.inf, 1], False),
        ([np.nan, 1], False),
        ([-np.inf, -np.inf], False),
    ],
)
def test_rows_without_a_largest_number(row: list[float], fine: bool) -> None:
    rows = np.array([[2, 3], row, [4, 5]], np.float32)
    if fine:
        check_finite(rows)
    else:
        with pytest.raises(ValueError, match="not finite"):
            check_finite(rows)


def test_every_row_has_its_own_largest_number() -> None:
    rows = np.array([[0, 1], [1000, 1001], [-1e30, -1e30]], np.float32)
    found = log_softmax(rows)
    assert np.allclose(found[:2], np.log([0.26894142, 0.73105858]), atol=1e-6)
    assert np.allclose(found[2], np.log(0.5))


def test_tokens_that_are_named() -> None:
    sampling = Sampling(stop_token_ids=(1,), allowed_token_ids=(2, 3), logit_bias=((4, 1.0),))
    assert list(sampling.named_tokens) == [1, 2, 3, 4]
    assert list(Sampling().named_tokens) == []
    assert Sampling().max_tokens == 128  # where nobody says how many
