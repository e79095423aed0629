"""Tensors on disk that loading turns into parameters, of which a run holds some whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from ..files.tensors import LazyTensor, LazyTensors
from .quantized.tensor import held

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rejoined:
    """One such tensor with the run's values. `parts` makes it and all that is converted with it;
    those stay in memory for the thread that reads them."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Tensors]

    def load(self) -> torch.Tensor:
        return held(self.parts, self.parts)[self.name].to(self.dtype, copy=True)

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        flat = held(self.parts, self.parts)[self.name].view(-1)
        buffer.copy_(flat[start : start + buffer.numel()])


def rejoined(
    own: LazyTensors, members: LazyTensors, convert: Callable[[Tensors], Tensors], model: Any
) -> LazyTensors | None:
    """The tensors on disk `members`, which `convert` makes parameters of `model` of, with `own`,
    some of these parameters, in their place; None where saving makes others of them."""
    from transformers.core_model_loading import revert_weight_conversion

    def parts(load: Callable[[LazyTensor], torch.Tensor]) -> Tensors:
        values = convert({name: load(tensor) for name, tensor in members.items()})
        values = {**values, **{name: load(tensor) for name, tensor in own.items()}}
        stored = revert_weight_conversion(model, values)
        return {name: tensor.contiguous() for name, tensor in stored.items()}

    made = parts(lambda tensor: torch.empty(tensor.shape, device="meta"))
    if {n: tuple(t.shape) for n, t in made.items()} != {n: t.shape for n, t in members.items()}:
        return None
    dtype = reduce(torch.promote_types, (t.dtype for t in (*members.values(), *own.values())))
    path = next(iter(own.values())).path
    load = partial(parts, lambda tensor: tensor.load())
    return {name: Rejoined(name, path, dtype, t.shape, load) for name, t in members.items()}
