"""How exact float32 is for a model and its prompts, measured: what no correct artifact can beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

_DOUBLE = 4 << 30  # bytes of float32 weights that are computed in float64, in twice the memory
_ORDER = 0.01  # of the largest number: more than that is no other order of the same computation


def noise(
    model: Any, measure: Callable[[Any], Sequence[torch.Tensor]], known: Sequence[torch.Tensor]
) -> tuple[float, str]:
    """The largest difference of `known`, what `measure` finds with `model` in float32, to the same
    in float64; and what it was compared with.

    Where the weights are too large for that, or the model computes in float32 only, to float32 in
    another order: row by row, with the plain implementation of attention where that is the same.
    Where none of these is (a class that draws lots draws others then), there is no noise known.
    """
    most = _ORDER * max(float(each.abs().max()) for each in known)

    def found(other: Any) -> float | None:
        try:
            far = difference(measure(other), known)
        except (RuntimeError, ValueError):  # parts of some models take float32 only
            return None
        return far if far <= most else None

    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if nbytes <= _DOUBLE:
        try:
            far = found(model.double())
        finally:
            model.float()  # exact: every number came from float32
        if far is not None:
            return far, "float64"
    for attention in ("eager", None):
        far = found(_RowByRow(model, attention))
        if far is not None:
            return far, "float32 in another order"
    return 0.0, "nothing: computed otherwise it is another computation"


def difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of two lists of tensors; not a number where one holds such, infinite
    where their shapes differ, as those of speech of another length."""
    if any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return math.inf
    parts = [(a.double() - b.double()).abs().max() for a, b in zip(one, other, strict=True)]
    return float(torch.stack(parts).max())


class _RowByRow:
    """`model`, which computes each row of a batch alone, with the implementation `attention`."""

    def __init__(self, model: Any, attention: str | None = None) -> None:
        self._model, self._attention = model, attention

    def __call__(self, **inputs: torch.Tensor) -> Any:
        from transformers.modeling_outputs import ModelOutput

        own = self._model.config._attn_implementation
        choose = getattr(self._model, "set_attn_implementation", lambda _name: None)
        rows = len(next(iter(inputs.values())))
        split = {name: value.chunk(rows) for name, value in inputs.items()}
        try:
            choose(self._attention or own)
            found = [self._model(**{n: v[row] for n, v in split.items()}) for row in range(rows)]
        finally:
            choose(own)
        names = [name for name, value in found[0].items() if isinstance(value, torch.Tensor)]
        return ModelOutput({name: _joined([each[name] for each in found]) for name in names})


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows) if rows[0].dim() else torch.stack(rows).mean()
