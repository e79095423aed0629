"""Fitting a run to a rank, an energy or a total size, with the error that costs.

All errors are relative in the Frobenius norm: ‖fitted ΔW − ΔW‖/‖ΔW‖, of one module, or of all
modules as if they were one matrix with each on its diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .errors import RunError, TargetError
from .files.tensors import load_finite, refuse_quantized
from .model.base import BaseModel
from .model.match import weight_in_memory
from .run import Run
from .updates.rank_one import cut, rank_for, tail
from .updates.update import Update

Spectra = Mapping[str, torch.Tensor]


def percent(error: float) -> str:
    return f"{100 * error:.3g} %"


@dataclass(frozen=True)
class FitReport:
    """`limit`: what was asked for, as `{"energy": 0.99}`. `ranks`, `errors`: per module.

    `error`: of all modules together. `parameters`: Σ rank·(in + out). `least`: under a budget, an
    error that no other distribution of it goes below (see `allocate`).
    """

    limit: dict[str, float]
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    parameters: int
    least: float | None = None

    @property
    def warning(self) -> str | None:
        """One line that says the error, None where there is none."""
        if not self.error:
            return None
        worst = max(self.errors, key=lambda module: self.errors[module])
        return (
            f"approximated: the update differs from the run's by {percent(self.error)} in all, "
            f"by at most {percent(self.errors[worst])} in one module ({worst})"
        )

    def renamed(self, modules: Mapping[str, str]) -> FitReport:
        """The same with other names of modules; those that have none keep their own."""
        return replace(
            self,
            ranks={modules.get(m, m): rank for m, rank in self.ranks.items()},
            errors={modules.get(m, m): error for m, error in self.errors.items()},
        )

    def lines(self) -> list[str]:
        """What is left of every module, and the error of each and of all."""
        width = max(len(module) for module in self.ranks)
        said = [
            f"{module:<{width}}  rank {rank:>4}  error {percent(self.errors[module]):>9}"
            for module, rank in self.ranks.items()
        ]
        said.append(
            f"{'all':<{width}}  {self.parameters:,} parameters, error {percent(self.error)}"
        )
        if self.least is not None:
            least = percent(self.least)
            said.append(f"no distribution of this budget has an error below {least}")
        return said


@dataclass(frozen=True)
class CurvePoint:
    """The error of the best fit of this many parameters, and its mean rank."""

    parameters: int
    error: float
    mean_rank: float


def change(update: Update, weight: torch.Tensor) -> torch.Tensor:
    """W' − W, float64 `[out, in]`; `weight` is W, float32."""
    return update.merge(weight.clone(), 0).double() - weight.double()


def _dense_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition by the eigenvectors of the smaller Gram matrix, float64.

    Several times faster than an SVD. Singular values below 1e-8 of the largest are inexact, which
    is below the rounding of float32 weights.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _dense_svd(matrix.T)
        return vh.T, s, u.T
    u = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    rows = u.T @ matrix
    s = rows.norm(dim=1)
    order = s.argsort(descending=True)
    s = s[order]
    vh = torch.where(s[:, None] > 0, rows[order] / s[:, None], 0.0)
    return u[:, order], s, vh


def _svd(
    run: Run, module: str, base: BaseModel | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    components = run.updates[module].components()
    if components is not None:
        return components.svd()
    return _dense_svd(change(run.updates[module], base_weight(run, module, base)))


def base_weight(run: Run, module: str, base: BaseModel | None) -> torch.Tensor:
    """The base's weight of `module` (or parameter), float32 `[out, in]`."""
    if base is None:
        raise RunError(
            "this module's update depends on the base weight",
            file=run.path,
            tensor=module,
            remedy="name the base with `base`",
        )
    shape = run.shapes[module]
    tensor = base.weight(module)
    if tensor is None or base.lends(module):
        found = weight_in_memory(run, base, module)
        if found is not None:
            return found
    transposed = base.is_transposed(module, shape, module in run.embeddings)
    assert tensor is not None
    refuse_quantized(tensor)
    weight = load_finite(tensor)
    return weight.T.contiguous() if transposed else weight.view(shape)


def fit_run(
    run: Run,
    base: BaseModel | None,
    *,
    max_rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> tuple[Run, FitReport]:
    """A stripped run with every update cut to `max_rank` components, to the share `energy` of its
    squared singular values, or to its part of `budget` parameters in all (see `allocate`).

    `base` is needed for updates that are not sums of components. An update from which nothing has
    to go is kept as it is. The result holds its components in memory.
    """
    given = {"max_rank": max_rank, "energy": energy, "budget": budget}
    limit = {name: value for name, value in given.items() if value is not None}
    if len(limit) != 1 or not all(value > 0 for value in limit.values()):
        raise TargetError(
            "a fit has one limit", found=limit, expected="max_rank, energy or budget, over 0"
        )
    if energy is not None and energy > 1:
        raise TargetError("energy is a share", found=energy, expected="over 0, up to 1")
    shares: dict[str, int] = {}
    costs = {module: sum(shape) for module, shape in run.shapes.items()}
    most = None
    if budget is not None:
        values = _spectra(run, base)
        shares, most = allocate(values, costs, budget)
        if not any(shares.values()) and any(bool(s.any()) for s in values.values()):
            raise TargetError(
                "the budget does not hold a single component",
                found=budget,
                expected=f"at least {min(costs.values())} parameters",
            )
    updates: dict[str, Update] = {}
    ranks: dict[str, int] = {}
    spectra: dict[str, torch.Tensor] = {}
    for module, update in run.updates.items():
        u, s, vh = _svd(run, module, base)
        rank = rank_for(s, shares.get(module, max_rank), energy)
        components = update.components()
        keep = components is not None and rank >= components.rank
        updates[module] = update if keep else cut(u, s, vh, rank)
        ranks[module], spectra[module] = rank, s
    error, least = _total_error(spectra, ranks), None
    if most is not None:
        total = sum(float(s.square().sum()) for s in spectra.values())
        least = min(error, math.sqrt(max(0.0, 1 - most / total))) if total else 0.0
    report = FitReport(
        limit=limit,
        ranks=ranks,
        errors={module: tail(s, ranks[module]) for module, s in spectra.items()},
        error=error,
        parameters=sum(rank * costs[module] for module, rank in ranks.items()),
        least=least,
    )
    told = () if report.warning is None else (report.warning,)
    return replace(run, updates=updates, fit=report, warnings=(*run.warnings, *told)), report


def prepare(run: Run, base: BaseModel | None, **limit: float | None) -> Run:
    """The run as a target takes it: without pruned components, and fitted where a limit of
    `fit_run` is given."""
    stripped = run.strip()
    given = {name: value for name, value in limit.items() if value is not None}
    return fit_run(stripped, base, **given)[0] if given else stripped  # type: ignore[arg-type]


def _spectra(run: Run, base: BaseModel | None) -> dict[str, torch.Tensor]:
    return {module: _svd(run, module, base)[1] for module in run.updates}


def _total_error(spectra: Spectra, ranks: Mapping[str, int]) -> float:
    total = sum(float(s.square().sum()) for s in spectra.values())
    lost = sum(float(s[ranks[module] :].square().sum()) for module, s in spectra.items())
    return math.sqrt(lost / total) if total else 0.0


def allocate(
    spectra: Spectra, costs: Mapping[str, int], budget: int
) -> tuple[dict[str, int], float]:
    """Ranks whose Σ rank·cost is at most `budget`, and the most Σσ² that any such ranks keep.

    Greedy: the component of the largest σ²/cost that still fits is taken next. Within a module σ
    falls and the cost is the same, so a module's components are taken in their order.

    - All costs equal: no ranks keep more. The budget holds k components, and these are the k
      largest; by Eckart and Young no other factors of those ranks keep more either. The second
      value returned is what they keep.
    - Costs differ: a knapsack problem. The second value returned is that of its linear
      relaxation, in which the first component that does not fit is taken in part; no ranks keep
      more. The greedy ones keep less than that by at most the σ² of that component.
    """
    components = sorted(
        (
            (sigma * sigma / costs[module], module)
            for module, s in spectra.items()
            for sigma in s.tolist()
            if sigma > 0
        ),
        key=lambda component: -component[0],
    )
    ranks = dict.fromkeys(spectra, 0)
    # Σ rank·cost is a multiple of what the costs have in common, so the rest is of no use.
    left = budget - budget % (math.gcd(*costs.values()) or 1)
    kept, most = 0.0, None
    for density, module in components:
        if costs[module] <= left:
            ranks[module] += 1
            left -= costs[module]
            kept += density * costs[module]
        elif most is None:
            most = kept + density * left
    return ranks, kept if most is None else most


def curve(run: Run, base: BaseModel | None, points: int = 20) -> list[CurvePoint]:
    """Size against error of a stripped run: what `budget` gives for evenly spaced sizes."""
    spectra = _spectra(run, base)
    costs = {module: sum(shape) for module, shape in run.shapes.items()}
    full = sum(int((s > 0).sum()) * costs[module] for module, s in spectra.items())
    result = []
    for budget in sorted({full * point // points for point in range(1, points + 1)}):
        ranks, _ = allocate(spectra, costs, budget)
        parameters = sum(rank * costs[module] for module, rank in ranks.items())
        mean = sum(ranks.values()) / max(1, len(ranks))
        result.append(CurvePoint(parameters, _total_error(spectra, ranks), mean))
    return result
