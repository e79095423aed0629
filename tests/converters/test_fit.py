"""Fits against the float64 SVD of the dense matrix, budgets against every distribution."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import DoraExportError
from converters.fit import _dense_svd, allocate, change, curve, fit_run
from converters.run import Run, strip_update
from converters.updates.rank_one import RankOneSum, cut, rank_for, tail
from converters.updates.update import Update
from tests.conftest import Dense

few = settings(max_examples=40, deadline=None)


def approximate(update: Update, weight: torch.Tensor, **limit: Any) -> tuple[RankOneSum, float]:
    """As `fit_run` fits an update that is no sum of components, on its weight."""
    u, s, vh = _dense_svd(change(update, weight))
    rank = rank_for(s, limit.get("max_rank"), limit.get("energy"))
    return cut(u, s, vh, rank), tail(s, rank)


def random_sum(out: int, inn: int, rank: int, seed: int = 0, size: float = 1.0) -> RankOneSum:
    generator = torch.Generator().manual_seed(seed)
    return RankOneSum(
        torch.randn(rank, inn, generator=generator) * size,
        torch.randn(rank, generator=generator),
        torch.randn(out, rank, generator=generator) / size,
    )


def truth(update: RankOneSum) -> torch.Tensor:
    return (update.b.double() * update.c.double()) @ update.a.double()


@st.composite
def sums(draw: st.DrawFn) -> RankOneSum:
    out, inn, rank = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(0, 8))
    size = 10.0 ** draw(st.integers(-6, 6))
    return random_sum(out, inn, rank, draw(st.integers(0, 1 << 20)), size)


def best_error(matrix: torch.Tensor, rank: int) -> float:
    """The least error of any matrix of that rank (Eckart and Young)."""
    s = torch.linalg.svdvals(matrix)
    return float(s[rank:].norm() / s.norm()) if float(s.norm()) else 0.0


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = float(expected.norm())
    return float((found - expected).norm()) / size if size else float(found.norm())


@few
@given(sums(), st.integers(0, 9))
def test_no_sum_of_that_rank_is_nearer(update: RankOneSum, max_rank: int) -> None:
    fitted, error = update.fit(max_rank=max_rank)
    assert fitted.rank <= max_rank
    assert abs(error - best_error(truth(update), max_rank)) <= 1e-7
    assert abs(relative(truth(fitted), truth(update)) - error) <= 1e-6


@few
@given(sums(), st.floats(0.01, 1.0))
def test_energy_keeps_the_smallest_rank_that_reaches_it(update: RankOneSum, energy: float) -> None:
    fitted, error = update.fit(energy=energy)
    assert 1 - error**2 >= energy - 1e-12
    assert abs(relative(truth(fitted), truth(update)) - error) <= 1e-6
    if fitted.rank:
        assert 1 - best_error(truth(update), fitted.rank - 1) ** 2 <= energy + 1e-12


@few
@given(sums(), st.integers(1, 4))
def test_dependent_components_are_reduced_without_loss(update: RankOneSum, copies: int) -> None:
    repeated = RankOneSum(
        update.a.repeat(copies, 1), update.c.repeat(copies), update.b.repeat(1, copies)
    )
    reduced = repeated.reduced()
    assert reduced.rank == int(torch.linalg.matrix_rank(truth(update)))
    assert relative(truth(reduced), truth(repeated)) <= 1e-6


@few
@given(st.integers(0, 8), st.integers(0, 1 << 20), st.integers(0, 12))
def test_independent_components_stay_as_they_are(rank: int, seed: int, spread: int) -> None:
    update = random_sum(12, 10, rank, seed)
    scales = torch.logspace(0, -spread, max(1, rank))[:rank]
    update = RankOneSum(update.a, update.c * scales, update.b)
    assert update.reduced() is update
    assert update.fit(max_rank=rank) == (update, 0.0)


def test_components_that_cancel_leave_nothing() -> None:
    one = random_sum(6, 5, 2)
    both = RankOneSum(one.a.repeat(2, 1), torch.cat([one.c, -one.c]), one.b.repeat(1, 2))
    stripped = strip_update(both, "module", Path("run"))
    assert isinstance(stripped, RankOneSum)
    assert stripped.rank == 0


@few
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1 << 20))
def test_a_dense_update_is_approximated_as_by_its_svd(
    out: int, inn: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(out, inn, generator=generator)
    fitted, error = approximate(Dense(delta), torch.zeros(out, inn), max_rank=rank)
    assert fitted.rank == min(rank, out, inn)
    assert abs(error - best_error(delta.double(), rank)) <= 1e-7
    assert abs(relative(truth(fitted), delta.double()) - error) <= 1e-6


def test_a_low_rank_dense_update_is_found_on_top_of_its_weight() -> None:
    update, weight = random_sum(20, 30, 3), torch.randn(20, 30)
    fitted, error = approximate(Dense(update.dense()), weight, energy=1 - 1e-12)
    assert fitted.rank >= 3
    assert error <= 1e-6
    assert relative(truth(fitted), truth(update)) <= 1e-6
    # the control: one component less is another matrix
    assert relative(truth(update.fit(max_rank=2)[0]), truth(update)) > 1e-2


def kept(spectra: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    return sum(float(s[: ranks[m]].square().sum()) for m, s in spectra.items())


@st.composite
def modules(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    values = st.lists(st.floats(0.01, 10), min_size=0, max_size=4)
    return {
        f"m{i}": torch.tensor(sorted(draw(values), reverse=True), dtype=torch.float64)
        for i in range(draw(st.integers(1, 4)))
    }


def brute_force(spectra: dict[str, torch.Tensor], costs: dict[str, int], budget: int) -> float:
    best = 0.0
    for ranks in product(*(range(len(s) + 1) for s in spectra.values())):
        chosen = dict(zip(spectra, ranks, strict=True))
        if sum(rank * costs[m] for m, rank in chosen.items()) <= budget:
            best = max(best, kept(spectra, chosen))
    return best


@few
@given(modules(), st.integers(0, 200))
def test_a_budget_is_spent_best_where_all_costs_are_equal(
    spectra: dict[str, torch.Tensor], budget: int
) -> None:
    costs = dict.fromkeys(spectra, 12)
    ranks, most = allocate(spectra, costs, budget)
    assert 12 * sum(ranks.values()) <= budget
    assert kept(spectra, ranks) == pytest.approx(brute_force(spectra, costs, budget))
    assert most == pytest.approx(kept(spectra, ranks))


@few
@given(modules(), st.integers(0, 120), st.lists(st.integers(3, 30), min_size=4, max_size=4))
def test_a_budget_is_within_one_component_of_the_best_where_costs_differ(
    spectra: dict[str, torch.Tensor], budget: int, sizes: list[int]
) -> None:
    costs = dict(zip(spectra, sizes, strict=False))
    ranks, most = allocate(spectra, costs, budget)
    best = brute_force(spectra, costs, budget)
    assert sum(rank * costs[m] for m, rank in ranks.items()) <= budget
    assert kept(spectra, ranks) <= best + 1e-9
    assert best <= most + 1e-9
    largest = max((float(s[0] ** 2) for s in spectra.values() if len(s)), default=0.0)
    assert most <= kept(spectra, ranks) + largest + 1e-9


def diagonal(*blocks: torch.Tensor) -> torch.Tensor:
    matrix: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def run_of(**updates: Update) -> Run:
    return Run(path=Path("run"), method="test", updates=updates)


def test_a_run_is_fitted_module_by_module_and_in_all() -> None:
    updates = {"one": random_sum(20, 10, 6), "two": random_sum(20, 10, 5, seed=1, size=10.0)}
    run = run_of(**updates)
    whole = diagonal(*(truth(update) for update in updates.values()))
    for limit in ({"max_rank": 2}, {"energy": 0.9}, {"budget": 150}):
        fitted, report = fit_run(run, None, **limit)
        found = {}
        assert fitted.updates.keys() == updates.keys()
        for module, update in fitted.updates.items():
            components = update.components()
            assert components is not None
            assert components.rank == report.ranks[module]
            found[module] = truth(components)
            error = relative(found[module], truth(updates[module]))
            assert report.errors[module] == pytest.approx(error, abs=1e-6)
        assert report.error == pytest.approx(relative(diagonal(*found.values()), whole))
        assert report.parameters == 30 * sum(report.ranks.values())
        assert report.warning is not None
        assert "approximated" in report.warning
    # Equal costs: the best rank-5 part of the block-diagonal matrix.
    assert report.error == pytest.approx(best_error(whole, 5))
    assert report.least == pytest.approx(report.error)


def test_a_limit_that_cuts_nothing_changes_nothing_and_warns_of_nothing() -> None:
    run = run_of(one=random_sum(20, 10, 6))
    fitted, report = fit_run(run, None, max_rank=6)
    assert fitted.updates["one"] is run.updates["one"]
    assert report.error == 0
    assert report.warning is None


def test_the_curve_falls_to_zero_and_is_what_a_budget_gives() -> None:
    run = run_of(one=random_sum(20, 10, 6), two=random_sum(15, 8, 4, seed=1))
    points = curve(run, None)
    errors = [point.error for point in points]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert len(points) > 7
    for point in points[3::4]:
        _, report = fit_run(run, None, budget=point.parameters)
        assert report.error == pytest.approx(point.error)
        assert report.parameters == point.parameters


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({}, "one limit"),
        ({"max_rank": 2, "energy": 0.5}, "one limit"),
        ({"max_rank": 0}, "one limit"),
        ({"energy": 1.5}, "share"),
        ({"energy": math.nan}, "one limit"),
        ({"budget": 29}, "single component"),
    ],
)
def test_limits_that_mean_nothing_are_refused(limit: dict[str, float], message: str) -> None:
    with pytest.raises(DoraExportError, match=message):
        fit_run(run_of(one=random_sum(20, 10, 6)), None, **limit)  # type: ignore[arg-type]


def test_an_update_that_needs_the_base_asks_for_it() -> None:
    with pytest.raises(DoraExportError, match="`base`"):
        fit_run(run_of(one=Dense(torch.randn(4, 5))), None, max_rank=1)
