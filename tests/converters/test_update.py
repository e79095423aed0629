"""The rank-1 algebra, and every kind of update, against float64, on shapes and ranks from
hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.updates.in_turn import InTurn
from converters.updates.magnitude import MagnitudeUpdate
from converters.updates.memo import held_bytes
from converters.updates.peft_layer import LayerUpdate
from converters.updates.rank_one import RankOneSum, rank_for
from converters.updates.replaced import ReplacedRows, Replacement
from converters.updates.rotated import rotated
from converters.updates.stacked import Stacked
from converters.updates.update import Update, transposed


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
    # Factors are rounded to float32, whatever of their products then cancels.
    sizes = update.c.abs().double() * update.a.double().norm(dim=1) * update.b.double().norm(dim=0)
    off = (b.double() @ a.double() - truth(update)).norm()
    assert float(off) <= 2e-7 * float(sizes.sum()) + 1e-30
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


def test_a_component_with_one_zero_b_is_stripped() -> None:
    b = torch.ones(3, 2)
    b[:, 0] = 0
    stripped = RankOneSum(torch.randn(2, 4), torch.ones(2), b).strip()
    assert stripped.rank == 1 and torch.equal(stripped.b, torch.ones(3, 1))


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), max_size=6), st.integers(0, 4))
def test_all_the_energy_keeps_no_zeros(values: list[float], zeros: int) -> None:
    s = torch.tensor(sorted(values, reverse=True) + [0.0] * zeros, dtype=torch.float64)
    assert rank_for(s, None, 1.0) == len(values) == rank_for(s, len(s) + 1, None)


# A kind of update: of `[out, in]`, what it makes of a weight in float64.
Truth = Callable[[torch.Tensor], torch.Tensor]
Case = tuple[Update, Truth]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def plain(out: int, inn: int, rank: int) -> Case:
    update = RankOneSum(random(rank, inn), random(rank), random(out, rank))
    return update, lambda weight: weight + truth(update)


def magnitude(out: int, inn: int, rank: int) -> Case:
    delta, _ = plain(out, inn, rank)
    assert isinstance(delta, RankOneSum)
    lengths = random(out).abs() + 0.1

    def expected(weight: torch.Tensor) -> torch.Tensor:
        changed = weight + truth(delta)
        norm = changed.square().sum(dim=1, keepdim=True).sqrt()
        return changed * (lengths.double().unsqueeze(1) / norm)

    return MagnitudeUpdate(lengths, delta), expected


def stacked(out: int, inn: int, rank: int) -> Case:
    """Up to three parts on rows dealt out at random, some of which no part has."""
    owners = torch.randint(0, 4, (out,))
    parts = []
    for number in range(3):
        index = (owners == number).nonzero().flatten()
        if len(index):
            update = RankOneSum(random(rank, inn), random(rank), random(len(index), rank))
            parts.append((index, update))

    def expected(weight: torch.Tensor) -> torch.Tensor:
        result = weight.clone()
        for index, update in parts:
            for row, number in enumerate(index.tolist()):
                result[number] += truth(update)[row]
        return result

    return Stacked((out, inn), tuple(parts)), expected


def turned(out: int, inn: int, rank: int) -> Case:
    update, expected = magnitude(inn, out, rank)
    return transposed(update), lambda weight: expected(weight.T.contiguous()).T


def turned_sum(out: int, inn: int, rank: int) -> Case:
    update, expected = plain(inn, out, rank)
    return transposed(update), lambda weight: expected(weight.T.contiguous()).T


def mora(out: int, inn: int, rank: int) -> Case:
    n = 2 * max(1, rank)
    matrix = random(n, n)

    def expected(weight: torch.Tensor) -> torch.Tensor:
        result, count = weight.clone(), -(-inn // n)
        for o in range(out):
            block, row = divmod(o % (count * n), n)
            for j in range(n):
                angle = block * 10000 ** (-2 * (j % (n // 2)) / n)
                other = matrix[row, j + n // 2] if j < n // 2 else -matrix[row, j - n // 2]
                turn = matrix[row, j].double() * math.cos(angle) + other.double() * math.sin(angle)
                result[o, (block * n + j) % inn] += turn
        return result

    return rotated(matrix, (out, inn)), expected


def replaced_rows(out: int, inn: int, rank: int) -> Case:
    index = torch.randperm(out)[: min(rank, out)]
    rows = random(len(index), inn)

    def expected(weight: torch.Tensor) -> torch.Tensor:
        result = weight.clone()
        for number, row in zip(index.tolist(), rows, strict=True):
            result[number] = row.double()
        return result

    return ReplacedRows(index, rows, (out, inn)), expected


def replacement(out: int, inn: int, rank: int) -> Case:  # noqa: ARG001
    weight = random(out, inn)
    return Replacement(weight), lambda _: weight.double()


def layer(out: int, inn: int, rank: int) -> Case:
    """PEFT's own LoRA layer."""
    from peft.tuners.lora import Linear, LoraConfig

    module = Linear(
        torch.nn.Linear(inn, out), "default", LoraConfig(init_lora_weights=False), r=rank + 1
    )
    a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
    delta = b.double() @ a.double() * module.scaling["default"]
    return LayerUpdate("q", module, (out, inn), False, Path("x")), lambda weight: weight + delta


KINDS = [
    *(plain, magnitude, stacked, turned, turned_sum, mora, replaced_rows, replacement, layer),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 13), st.integers(1, 13), st.integers(0, 4), st.integers(1, 14), st.integers(0)
)
def test_blocks_of_any_size_make_the_whole_weight(
    kind: Callable[[int, int, int], Case],
    dtype: torch.dtype,
    out: int,
    inn: int,
    rank: int,
    step: int,
    seed: int,
) -> None:
    torch.manual_seed(seed % (1 << 32))
    update, expected = kind(out, inn, rank)
    assert update.shape == (out, inn)
    assert update.whole is (kind in (turned, layer))
    weight = random(out, inn).to(dtype)  # the base's dtype, widened before anything is added
    right = expected(weight.double())
    step = out if update.whole else step
    blocks = [update.merge(weight[i : i + step].float().clone(), i) for i in range(0, out, step)]
    merged = torch.cat(blocks)
    assert merged.dtype == torch.float32
    size = right.norm(dim=1) + weight.double().norm(dim=1) + (right - weight.double()).norm(dim=1)
    assert bool(((merged.double() - right).norm(dim=1) <= 2e-6 * size).all())
    # The components, where there are some, are the same update once more.
    components = update.components()
    if components is not None:
        assert close(weight.double() + truth(components), right)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_begins_a_row_late_is_seen(kind: Callable[[int, int, int], Case]) -> None:
    torch.manual_seed(0)
    update, expected = kind(8, 7, 3)
    weight = random(8, 7)
    if update.whole:
        wrong = update.merge(weight.roll(1, 0).clone(), 0)
    else:
        halves = [(0, 0), (4, 3)]  # rows from 4 on, told as rows from 3 on
        wrong = torch.cat([update.merge(weight[i : i + 4].clone(), told) for i, told in halves])
    assert float((wrong.double() - expected(weight.double())).abs().max()) > 1e-3


def test_the_memory_of_an_update_is_that_of_its_tensors() -> None:
    parts = ((torch.arange(4), RankOneSum(random(2, 5), random(2), random(4, 2))),)
    assert held_bytes(Stacked((4, 5), parts)) == 4 * 8 + 4 * (10 + 2 + 8)
    # A view keeps all that it is a view of.
    assert held_bytes(random(10, 10)[:1]) == 400


def test_several_in_turn() -> None:
    """A tied pair trained on both sides: each adds to what those before it made."""
    first = RankOneSum(torch.randn(2, 5), torch.ones(2), torch.randn(6, 2))
    last = Replacement(torch.randn(6, 5), whole=True)
    weight = torch.randn(6, 5)
    for updates, expected in (
        ((first, first), weight.double() + 2 * truth(first)),
        ((first, last), last.weight.double()),
        ((last, first), last.weight.double() + truth(first)),
    ):
        both = InTurn(updates)
        rows = [both.merge(weight[start:end].clone(), start) for start, end in ((0, 4), (4, 6))]
        assert close(torch.cat(rows), expected)
        assert both.shape == (6, 5)
        assert both.whole == (last in updates)
