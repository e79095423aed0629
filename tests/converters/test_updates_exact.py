"""Every kind of update against float64, on the edges: blocks, zeros, extremes, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import TargetError
from converters.updates.magnitude import MagnitudeUpdate
from converters.updates.rank_one import RankOneSum, cut, rank_for, stored_error, tail
from converters.updates.stacked import Stacked
from converters.updates.update import Update, convolution_matrix, transposed
from tests.conftest import Dense

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def random_sum(out: int, inn: int, rank: int, seed: int = 0) -> RankOneSum:
    generator = torch.Generator().manual_seed(seed)
    return RankOneSum(
        torch.randn(rank, inn, generator=generator),
        torch.randn(rank, generator=generator),
        torch.randn(out, rank, generator=generator),
    )


def truth(update: RankOneSum) -> np.ndarray:
    """ΔW in float64, written as the sum it is."""
    a, c, b = (part.double().numpy() for part in (update.a, update.c, update.b))
    total = np.zeros(update.shape)
    for i in range(len(c)):
        total += c[i] * np.outer(b[:, i], a[i])
    return total


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(found.double().numpy() - expected) / (size or 1))


SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(0, 6), st.integers(0, 99))


@EXAMPLES
@given(SHAPES)
def test_dense_norms_shape_and_rank(numbers: tuple[int, int, int, int]) -> None:
    update = random_sum(*numbers)
    assert (update.shape, update.rank) == (numbers[:2], numbers[2])
    assert update.whole is False
    assert update.components() is update
    assert update.dense().dtype == torch.float32
    assert error(update.dense(), truth(update)) < 1e-6
    norms = update.norms()
    assert norms.dtype == torch.float64
    for i in range(update.rank):
        one = RankOneSum(update.a[i : i + 1], update.c[i : i + 1], update.b[:, i : i + 1])
        assert float(norms[i]) == pytest.approx(np.linalg.norm(truth(one)), rel=1e-12)
    assert update.norm() == pytest.approx(np.linalg.norm(truth(update)), rel=1e-9, abs=1e-12)


def test_norms_of_numbers_whose_squares_leave_the_range_of_float32() -> None:
    update = RankOneSum(torch.full((1, 4), 1e25), torch.tensor([-2.0]), torch.full((3, 1), 1e-30))
    assert float(update.norms()) == pytest.approx(2e-5 * np.sqrt(12), rel=1e-6)
    assert update.norm() == pytest.approx(2e-5 * np.sqrt(12), rel=1e-6)


@pytest.mark.parametrize(("a", "c", "b"), [(3, 2, 2), (2, 2, 3), (2, 3, 2)])
def test_factors_of_different_ranks_are_refused(a: int, c: int, b: int) -> None:
    with pytest.raises(ValueError, match="ranks differ"):
        RankOneSum(torch.ones(a, 4), torch.ones(c), torch.ones(5, b))


@pytest.mark.parametrize("zero", ["a", "b", "c"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_component_goes_where_one_of_its_parts_is_zero(zero: str, at: int) -> None:
    update = random_sum(4, 5, 3)
    {"a": update.a, "c": update.c, "b": update.b.T}[zero][at] = 0
    stripped = update.strip()
    kept = [i for i in range(3) if i != at]
    assert torch.equal(stripped.a, update.a[kept])
    assert torch.equal(stripped.c, update.c[kept])
    assert torch.equal(stripped.b, update.b[:, kept])


def test_strip_keeps_vectors_that_are_zero_in_part_and_is_itself_without_zeros() -> None:
    update = random_sum(4, 5, 2)
    update.a[0, :4], update.b[1:, 1] = 0, 0
    assert update.strip() is update


@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_is_finite_looks_at_every_part(part: str) -> None:
    update = random_sum(4, 5, 2)
    assert update.is_finite()
    getattr(update, part).view(-1)[-1] = float("inf")
    assert not update.is_finite()


def test_sorted_by_size_equal_ones_in_their_order() -> None:
    a = torch.tensor([[1.0, 0], [0, 3], [0, 1], [2, 0]])
    update = RankOneSum(a, torch.tensor([1.0, -1, 1, 1]), torch.eye(4))
    ordered = update.sorted()
    assert ordered.norms().tolist() == [3, 2, 1, 1]
    assert torch.equal(ordered.b, torch.eye(4)[:, [1, 3, 0, 2]])
    assert np.array_equal(truth(ordered), truth(update))


@EXAMPLES
@given(SHAPES)
def test_transposed_sums(numbers: tuple[int, int, int, int]) -> None:
    update = random_sum(*numbers)
    other = transposed(update)
    assert isinstance(other, RankOneSum)
    assert other.shape == update.shape[::-1]
    assert np.allclose(truth(other), truth(update).T, atol=0)
    assert other.a.is_contiguous() and other.b.is_contiguous()


@EXAMPLES
@given(SHAPES)
def test_balanced(numbers: tuple[int, int, int, int]) -> None:
    update = random_sum(*numbers)
    scale = torch.logspace(-12, 12, max(update.rank, 1))[: update.rank]
    update = RankOneSum(update.a * scale[:, None], update.c, update.b / scale)
    a, b = update.balanced()
    assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
    assert error(b.double() @ a.double(), truth(update)) < 1e-6
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)
    # The sign of c is in B: every row of A points where it did.
    assert bool(((a * update.a).sum(dim=1) > 0).all())


@EXAMPLES
@given(SHAPES, st.integers(1, 4))
def test_reduced_is_the_same_of_the_true_rank(
    numbers: tuple[int, int, int, int], copies: int
) -> None:
    update = random_sum(*numbers)
    again = RankOneSum(
        update.a.repeat(copies, 1), update.c.repeat(copies) / copies, update.b.repeat(1, copies)
    )
    expected = truth(update)
    reduced = again.reduced()
    assert error(reduced.dense(), expected) < 2e-6
    if update.rank:
        assert reduced.rank == np.linalg.matrix_rank(expected, rtol=1e-6)
    assert reduced.a.dtype == reduced.b.dtype == reduced.c.dtype == torch.float32


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_independent_components_are_left_bit_for_bit(size: float) -> None:
    update = random_sum(6, 7, 3)
    update = RankOneSum(update.a * size, update.c, update.b)
    assert update.reduced() is update
    update.a[1] = update.a[0] * (1 + 1e-5 * torch.tensor([1.0, -1.0] * 3 + [1.0]))  # nearly one
    assert update.reduced() is update


def test_reduced_looks_at_both_sides() -> None:
    same_a, same_b = random_sum(6, 7, 2), random_sum(6, 7, 2)
    same_a.a[1], same_b.b[:, 1] = same_a.a[0], 2 * same_b.b[:, 0]
    for update in (same_a, same_b):
        assert update.reduced().rank == 1
        assert error(update.reduced().dense(), truth(update)) < 1e-6


def test_components_that_undo_each_other_reduce_to_nothing() -> None:
    one = random_sum(6, 7, 1)
    update = RankOneSum(
        torch.cat([one.a, one.a]), torch.cat([one.c, -one.c]), torch.cat([one.b, one.b], dim=1)
    )
    assert update.reduced().rank == 0
    assert update.reduced().shape == (6, 7)


def test_a_small_component_beside_a_large_one_is_kept() -> None:
    large, small = random_sum(6, 7, 1, seed=1), random_sum(6, 7, 1, seed=2)
    update = RankOneSum(
        torch.cat([large.a, large.a, small.a]),
        torch.cat([large.c / 2, large.c / 2, small.c * 1e-6]),
        torch.cat([large.b, large.b, small.b], dim=1),
    )
    assert update.reduced().rank == 2


@EXAMPLES
@given(SHAPES)
def test_svd_is_numpys(numbers: tuple[int, int, int, int]) -> None:
    update = random_sum(*numbers)
    u, s, vh = update.svd()
    assert u.dtype == s.dtype == vh.dtype == torch.float64
    expected = np.linalg.svd(truth(update), compute_uv=False)[: len(s)]
    assert np.allclose(s.numpy(), expected, atol=1e-12)
    assert np.allclose((u * s @ vh).numpy(), truth(update), atol=1e-12)
    assert np.allclose((vh @ vh.T).numpy(), np.eye(len(s)), atol=1e-12)


@EXAMPLES
@given(SHAPES, st.integers(0, 7))
def test_fit_to_a_rank_is_the_nearest(numbers: tuple[int, int, int, int], most: int) -> None:
    update = random_sum(*numbers)
    fitted, lost = update.fit(max_rank=most)
    values = np.linalg.svd(truth(update), compute_uv=False)
    assert fitted.rank <= most or fitted is update
    if most >= update.rank <= min(update.shape):
        assert fitted is update and lost == 0.0
        return
    total = np.sqrt((values**2).sum())
    assert lost == pytest.approx(np.sqrt((values[most:] ** 2).sum()) / total, rel=1e-6, abs=1e-9)
    assert error(fitted.dense(), truth(update)) == pytest.approx(lost, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (0.79, 1), (0.81, 2), (0.94, 2), (0.96, 3), (1.0, 3)]
)
def test_fit_to_a_share_of_the_energy(energy: float, rank: int) -> None:
    sizes = torch.tensor([4.0, 3**0.5, 1.0])  # squares 16, 3, 1 of 20: 0.8, 0.95, 1
    update = RankOneSum(torch.eye(3), sizes, torch.eye(3))
    fitted, lost = update.fit(energy=energy)
    assert fitted.rank == rank
    squares = [16.0, 3.0, 1.0]
    assert lost == pytest.approx((sum(squares[rank:]) / 20) ** 0.5, abs=1e-6)


def test_rank_for_counts_no_zeros_and_takes_one_limit() -> None:
    values = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    assert rank_for(values, None, 1.0) == 2
    assert [rank_for(values, most, None) for most in (0, 1, 2, 3)] == [0, 1, 2, 2]
    assert rank_for(torch.zeros(3), None, 0.5) == 0
    assert rank_for(torch.zeros(0), None, 0.5) == 0
    # A tiny last value is told from none where the whole is asked for.
    assert rank_for(torch.tensor([1.0, 1e-9], dtype=torch.float64), None, 1.0) == 2
    # The share itself is enough: 9 of 10.
    assert rank_for(torch.tensor([3.0, 1.0], dtype=torch.float64), None, 0.89) == 1
    for limits in ((None, None), (1, 0.5)):
        with pytest.raises(ValueError, match="either"):
            rank_for(values, *limits)
    for share in (0.0, -0.1, 1.01):
        with pytest.raises(ValueError, match="share"):
            rank_for(values, None, share)


def test_tail_and_cut() -> None:
    values = torch.tensor([4.0, 3.0], dtype=torch.float64)
    assert [tail(values, rank) for rank in (0, 1, 2)] == [1.0, 0.6, 0.0]
    assert tail(torch.zeros(2), 0) == 0.0
    u, s, vh = random_sum(5, 6, 3).svd()
    kept = cut(u, s, vh, 2)
    assert kept.rank == 2
    assert kept.a.dtype == kept.b.dtype == kept.c.dtype == torch.float32
    assert kept.a.is_contiguous() and kept.b.is_contiguous()
    assert np.allclose(truth(kept), (u[:, :2] * s[:2] @ vh[:2]).numpy(), atol=1e-6)


def test_stored_error_is_the_relative_difference() -> None:
    update = random_sum(5, 6, 2)
    a, b = update.balanced()
    assert stored_error(update, a, b) < 1e-6
    assert stored_error(update, a, 1.5 * b) == pytest.approx(0.5, rel=1e-5)
    assert stored_error(update, 0 * a, b) == pytest.approx(1.0, rel=1e-5)
    half = stored_error(update, a.bfloat16(), b.bfloat16())
    expected = (b.bfloat16().double() @ a.bfloat16().double()).numpy() - truth(update)
    assert half == pytest.approx(np.linalg.norm(expected) / np.linalg.norm(truth(update)), rel=1e-4)
    assert 1e-4 < half < 1e-2
    nothing = RankOneSum(torch.zeros(1, 6), torch.ones(1), torch.zeros(5, 1))
    assert stored_error(nothing, torch.zeros(1, 6), torch.zeros(5, 1)) == 0.0


@pytest.mark.parametrize("side", [0, 1])
def test_stored_factors_beyond_their_dtype_are_refused(side: int) -> None:
    update = random_sum(5, 6, 2)
    factors = [factor.half() for factor in update.balanced()]
    factors[side] = factors[side] * 60_000
    with pytest.raises(TargetError) as caught:
        stored_error(update, *factors)
    assert "torch.float16" in str(caught.value.expected)


@pytest.mark.parametrize("step", range(1, 9))
def test_sums_block_by_block(step: int) -> None:
    update, weight = random_sum(7, 5, 3), torch.randn(7, 5)
    blocks = []
    for start in range(0, 7, step):
        rows = weight[start : start + step].clone()
        assert update.merge(rows, start) is rows
        blocks.append(rows)
    assert error(torch.cat(blocks), weight.double().numpy() + truth(update)) < 1e-6


def test_a_sum_of_rank_0_changes_nothing() -> None:
    weight = torch.randn(7, 5)
    assert torch.equal(random_sum(7, 5, 0).merge(weight.clone(), 2), weight)


@pytest.mark.parametrize("step", range(1, 8))
def test_stacked_block_by_block(step: int) -> None:
    parts = (
        (torch.tensor([0, 2, 3]), random_sum(3, 5, 2, seed=1)),
        (torch.tensor([4, 6]), random_sum(2, 5, 1, seed=2)),
        (torch.tensor([1]), random_sum(1, 5, 0)),
    )
    update: Update = Stacked((7, 5), parts)
    assert update.whole is False
    assert update.components() is None
    weight = torch.randn(7, 5)
    expected = weight.double().numpy()
    for index, part in parts:
        expected[index.numpy()] += truth(part)
    blocks = []
    for start in range(0, 7, step):
        rows = weight[start : start + step].clone()
        assert update.merge(rows, start) is rows
        blocks.append(rows)
    assert error(torch.cat(blocks), expected) < 1e-6
    assert torch.equal(torch.cat(blocks)[1], weight[1])


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_magnitude_block_by_block(step: int) -> None:
    delta, magnitude = random_sum(5, 4, 2), torch.rand(5) + 0.5
    update: Update = MagnitudeUpdate(magnitude, delta)
    assert update.shape == (5, 4)
    assert update.whole is False
    assert update.components() is None
    weight = torch.randn(5, 4)
    moved = weight.double().numpy() + truth(delta)
    length = np.sqrt((moved**2).sum(axis=1, keepdims=True))
    expected = magnitude.double().numpy()[:, None] * moved / length
    blocks = [update.merge(weight[n : n + step].clone(), n) for n in range(0, 5, step)]
    assert error(torch.cat(blocks), expected) < 1e-6


def test_a_magnitude_takes_norms_that_float32_does_not_hold() -> None:
    update = MagnitudeUpdate(torch.ones(1), random_sum(1, 4, 0))
    rows = update.merge(torch.full((1, 4), 1e25), 0)
    assert torch.allclose(rows, torch.full((1, 4), 0.5))


@pytest.mark.parametrize("shape", [(4,), (5, 1), (6,)])
def test_a_magnitude_of_another_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        MagnitudeUpdate(torch.ones(shape), random_sum(5, 4, 1))


def test_a_convolution_is_a_matrix_with_its_outputs_as_rows() -> None:
    assert convolution_matrix((8, 3, 5, 2)) == torch.ones(8, 3, 5, 2).flatten(1).shape == (8, 30)


def test_what_is_no_sum_is_transposed_as_a_whole() -> None:
    matrix, weight = torch.randn(5, 4), torch.randn(4, 5)
    update: Update = transposed(Dense(matrix))
    assert (update.shape, update.whole, update.components()) == ((4, 5), True, None)
    rows = weight.clone()
    assert update.merge(rows, 0) is rows
    assert torch.equal(rows, weight + matrix.T)
    assert torch.equal(transposed(update).merge(weight.T.clone(), 0), weight.T + matrix)
