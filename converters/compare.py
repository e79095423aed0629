"""How far two runs are apart, matrix by matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from .errors import RunError
from .files.tensors import LazyTensor, load_finite
from .fit import base_weight, change
from .model.base import BaseModel
from .model.match import changed, stored_name
from .model.names import split_slice
from .run import LazyUpdates, Run
from .updates.rank_one import RankOneSum
from .updates.replaced import Replacement
from .updates.update import Update


@dataclass(frozen=True)
class Difference:
    """Two updates ΔA, ΔB of one matrix, or of all: squared Frobenius norms, and ⟨ΔA, ΔB⟩."""

    left: float
    right: float
    apart: float
    inner: float

    @property
    def relative(self) -> float | None:
        """‖ΔA − ΔB‖/‖ΔA‖; None where only ΔB is an update."""
        if not self.left:
            return None if self.right else 0.0
        return math.sqrt(self.apart / self.left)

    @property
    def cosine(self) -> float | None:
        """⟨ΔA, ΔB⟩/(‖ΔA‖·‖ΔB‖); None where one of them is zero."""
        size = math.sqrt(self.left * self.right)
        return self.inner / size if size else None


@dataclass(frozen=True)
class Comparison:
    """`modules`: by tensor name where a base is known, else by module. `whole`: the tensors either
    run trained whole, ‖A − B‖/‖A‖, None where one run alone has it."""

    modules: dict[str, Difference]
    whole: dict[str, float | None]

    @property
    def total(self) -> Difference:
        values = list(self.modules.values())
        return Difference(
            *(math.fsum(getattr(v, name) for v in values) for name in Difference.__annotations__)
        )


def compare(left: Run, right: Run, base: BaseModel | None, other: BaseModel | None) -> Comparison:
    """Compare the updates of two runs; `base` and `other` are their bases.

    From the factors where both are low-rank. Otherwise from the matrices, one at a time, for which
    the bases are needed.
    """
    names = base or other
    whole = [_brought(left, base, names), _brought(right, other, names)]
    ours, theirs = _named(left, names), _named(right, names)
    added = {name: module for name, module in theirs.items() if name not in ours}
    lost = {name: module for name, module in ours.items() if name not in theirs}
    left = _with_whole(left, base, whole[0], added)
    right = _with_whole(right, other, whole[1], lost)
    lefts, rights = _named(left, names), _named(right, names)
    modules = {
        name: _difference((left, lefts.get(name), base), (right, rights.get(name), other))
        for name in dict.fromkeys([*lefts, *rights])
    }
    rest = (
        {n: t for n, t in held.items() if n not in taken}
        for held, taken in zip(whole, (added, lost), strict=True)
    )
    return Comparison(modules, _whole(*rest))


Side = tuple[Run, str | None, BaseModel | None]


def _named(run: Run, base: BaseModel | None) -> dict[str, str]:
    """The name a module is compared by → the run's own."""
    return {stored_name(m, base) if base else f"{m}.weight": m for m in run.updates}


def _with_whole(
    run: Run, base: BaseModel | None, whole: dict[str, LazyTensor], theirs: dict[str, str]
) -> Run:
    """`run` with an update for what it holds `whole` and the other run has an update of."""
    added: dict[str, LazyTensor] = {}
    for name, module in theirs.items():
        if name in whole and base is not None:
            added[name.removesuffix(".weight")] = whole[name]
        elif {name, split_slice(module)[0]} & whole.keys():
            raise RunError(
                "one run holds whole what the other has an update of",
                file=run.path,
                tensor=module,
                remedy="name the base with `base`"
                if base is None
                else "compare what they compute (`verify`)",
            )
    if not added:
        return run
    assert base is not None
    conv1d = {module for module in added if base.is_conv1d(module)}
    loaders = {module: partial(run.take, module) for module in run.updates}
    loaders |= {m: partial(_replacement, tensor, m in conv1d) for m, tensor in added.items()}
    return replace(run, updates=LazyUpdates(loaders, run.shapes))


def _replacement(tensor: LazyTensor, transposed: bool) -> Update:
    weight = load_finite(tensor)
    return Replacement(weight.T.contiguous() if transposed else weight)


def _difference(left: Side, right: Side) -> Difference:
    updates = [run.updates[module] if module else None for run, module, _ in (left, right)]
    shapes = {update.shape for update in updates if update is not None}
    if len(shapes) > 1:
        raise RunError(
            "the runs are not of the same model: a module has two shapes",
            file=right[0].path,
            tensor=right[1],
            found=updates[1].shape if updates[1] else None,
            expected=updates[0].shape if updates[0] else None,
        )
    (shape,) = shapes
    factors = [_factors(update, shape) for update in updates]
    if factors[0] is not None and factors[1] is not None:
        return _by_factors(factors[0], factors[1])
    a, b = (
        _matrix(side, update, shape) for side, update in zip((left, right), updates, strict=True)
    )
    return Difference(*(float((x * y).sum()) for x, y in ((a, a), (b, b), (a - b, a - b), (a, b))))


def _factors(update: Update | None, shape: tuple[int, int]) -> RankOneSum | None:
    if update is None:
        return RankOneSum(torch.empty(0, shape[1]), torch.empty(0), torch.empty(shape[0], 0))
    return update.components()


def _by_factors(a: RankOneSum, b: RankOneSum) -> Difference:
    apart = RankOneSum(torch.cat([a.a, b.a]), torch.cat([a.c, -b.c]), torch.cat([a.b, b.b], dim=1))
    left, right, both = (float(update.svd()[1].square().sum()) for update in (a, b, apart))
    inner = (a.a.double() @ b.a.double().T) * ((a.b * a.c).double().T @ (b.b * b.c).double())
    return Difference(left, right, both, float(inner.sum()))


def _matrix(side: Side, update: Update | None, shape: tuple[int, int]) -> torch.Tensor:
    """ΔW, float64 `[out, in]`."""
    run, module, base = side
    if update is None or module is None:
        return torch.zeros(shape, dtype=torch.float64)
    components = update.components()
    if components is not None:
        return (components.b.double() * components.c.double()) @ components.a.double()
    return change(update, base_weight(run, module, base))


def _brought(run: Run, base: BaseModel | None, names: BaseModel | None) -> dict[str, LazyTensor]:
    """The tensors trained whole, by the base's names."""
    own = run.replaced if base is None else changed(run, base)
    return {(names.find(name) if names else None) or name: tensor for name, tensor in own.items()}


def _whole(left: dict[str, LazyTensor], right: dict[str, LazyTensor]) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for name in dict.fromkeys([*left, *right]):
        a, b = left.get(name), right.get(name)
        result[name] = None
        if a is not None and b is not None and a.shape == b.shape:
            first, second = load_finite(a).double(), load_finite(b).double()
            size = float(first.norm())
            result[name] = float((first - second).norm()) / size if size else None
    return result
