"""What a layer of PEFT does to its weight, by its own `merge()` (huggingface/peft,
`src/peft/tuners/`). No formula of a tuner is repeated here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError


@dataclass(frozen=True)
class LayerUpdate:
    """W' as `merge` of the PEFT `layer` makes it from W.

    `shape`: the weight's, `[out, in]`, a convolution's seen as a matrix. `flip`: whether the layer
    holds its weight the other way round, as `[in, out]`. `module` and `file` are for errors.
    """

    module: str
    layer: Any
    shape: tuple[int, int]
    flip: bool
    file: Path
    whole: bool = True

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:  # noqa: ARG002
        weight = rows.T if self.flip else rows.view(self.layer.get_base_layer().weight.shape)
        # PEFT changes some weights through a flat view, which only contiguous ones have.
        merged, _ = merge_layer(self.layer, weight.contiguous(), None, self.module, self.file)
        return rows.copy_(merged.T if self.flip else merged.reshape(rows.shape))

    def components(self) -> None:
        return None


@dataclass(frozen=True)
class MergedBias:
    """A merged bias, float32, calculated from the base when it is asked for."""

    name: str
    path: Path
    shape: tuple[int, ...]
    calculate: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.float32

    def load(self) -> torch.Tensor:
        return self.calculate()

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        buffer.copy_(self.load()[start : start + buffer.numel()])


def merge_layer(
    layer: Any, weight: torch.Tensor, bias: torch.Tensor | None, module: str, file: Path
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias after PEFT's own `merge()` of `layer`; both may be changed in place.

    It works on copies that share the adapter's tensors, so any number of threads may merge at once.
    Raises `RunError` when PEFT cannot.
    """
    work, inner = _shallow(layer), _shallow(layer.get_base_layer())
    work.base_layer, work.merged_adapters = inner, []
    inner.weight = torch.nn.Parameter(weight, requires_grad=False)
    if getattr(inner, "bias", None) is not None:
        bias = torch.zeros(inner.bias.shape) if bias is None else bias
        inner.bias = torch.nn.Parameter(bias, requires_grad=False)
    try:
        with torch.no_grad():
            work.merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise RunError(
            "PEFT cannot merge this layer",
            file=file,
            tensor=module,
            found=f"{type(error).__name__}: {str(error)[:600]}",
        ) from error
    return inner.weight.data, None if bias is None else inner.bias.data


def _shallow(module: Any) -> Any:
    """A copy of a torch module with the same tensors, whose attributes can be set by itself."""
    copied = copy.copy(module)
    copied._modules, copied._parameters = dict(module._modules), dict(module._parameters)
    return copied
