"""The rank-1 algebra against float64, on shapes and ranks from hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.updates.rank_one import RankOneSum


@st.composite
def sums(draw: st.DrawFn) -> RankOneSum:
    out, inn, rank = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    size = 10.0 ** draw(st.integers(-6, 6))
    c = torch.randn(rank, generator=generator)
    dead = torch.tensor(
        draw(st.lists(st.booleans(), min_size=rank, max_size=rank)), dtype=torch.bool
    )
    return RankOneSum(
        torch.randn(rank, inn, generator=generator) * size,
        c.masked_fill(dead, 0.0),
        torch.randn(out, rank, generator=generator) / size,
    )


def truth(update: RankOneSum) -> torch.Tensor:
    return (update.b.double() * update.c.double()) @ update.a.double()


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-6) -> bool:
    return bool((found.double() - expected).norm() <= bound * expected.norm() + 1e-30)


@settings(max_examples=60, deadline=None)
@given(sums())
def test_strip_and_sort_keep_the_update_and_drop_every_zero(update: RankOneSum) -> None:
    stripped = update.strip().sorted()
    assert stripped.rank == int((update.c != 0).sum())
    assert close(truth(stripped).float(), truth(update))
    norms = stripped.norms()
    assert bool((norms[:-1] >= norms[1:]).all())


@settings(max_examples=60, deadline=None)
@given(sums())
def test_balanced_factors_have_equal_norms_and_the_same_product(update: RankOneSum) -> None:
    stripped = update.strip()
    a, b = stripped.balanced()
    assert close(b.double() @ a.double(), truth(update))
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(sums(), st.integers(0, 8), st.integers(1, 9))
def test_merge_of_any_block_of_rows(update: RankOneSum, start: int, count: int) -> None:
    out, inn = update.shape
    start = min(start, out - 1)
    weight = torch.randn(out, inn)
    rows = weight[start : start + count].clone()
    update.merge(rows, start)
    expected = (weight.double() + truth(update))[start : start + count]
    norm = expected.norm(dim=1) + truth(update)[start : start + count].norm(dim=1)
    assert bool(((rows.double() - expected).norm(dim=1) <= 1e-6 * norm + 1e-30).all())


@settings(max_examples=60, deadline=None)
@given(sums())
def test_norm_and_transposed(update: RankOneSum) -> None:
    assert abs(update.norm() - float(truth(update).norm())) <= 1e-5 * update.norm() + 1e-12
    assert torch.allclose(truth(update.transposed()), truth(update).T)


def test_a_component_with_a_zero_vector_is_stripped() -> None:
    update = RankOneSum(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.ones(2), torch.ones(3, 2))
    assert update.strip().rank == 1
