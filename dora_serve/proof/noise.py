"""How exact float32 is for a model and its prompts, measured: what no correct artifact can beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_DOUBLE = 4 << 30  # bytes of float32 weights that are computed in float64, in twice the memory
_OUTPUTS = ("logits", "logits_per_image", "start_logits", "end_logits", "last_hidden_state")


def noise(
    model: Any, measure: Callable[[Any], Sequence[torch.Tensor]], known: Sequence[torch.Tensor]
) -> tuple[float, str]:
    """The largest difference of `known`, what `measure` finds with `model` in float32, to the same
    in float64; and what it was compared with.

    Where the weights are too large for that, or the model computes in float32 only, to float32 in
    another order: row by row, with the plain implementation of attention.
    """
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if nbytes <= _DOUBLE:
        try:
            return difference(measure(model.double()), known), "float64"
        except (RuntimeError, ValueError):  # parts of some models take float32 only
            pass
        finally:
            model.float()  # exact: every number came from float32
    return difference(measure(_RowByRow(model)), known), "float32 in another order"


def difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of two lists of tensors; not a number where one holds such."""
    parts = [(a.double() - b.double()).abs().max() for a, b in zip(one, other, strict=True)]
    return float(torch.stack(parts).max())


class _RowByRow:
    """`model`, which computes each row of a batch alone."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **inputs: torch.Tensor) -> Any:
        from transformers.modeling_outputs import ModelOutput

        own = self._model.config._attn_implementation
        choose = getattr(self._model, "set_attn_implementation", lambda _name: None)
        rows = len(next(iter(inputs.values())))
        try:
            choose("eager")
            found = [
                self._model(**{name: value[row : row + 1] for name, value in inputs.items()})
                for row in range(rows)
            ]
        finally:
            choose(own)
        names = [name for name in _OUTPUTS if name in found[0]]
        return ModelOutput({name: torch.cat([each[name] for each in found]) for name in names})
