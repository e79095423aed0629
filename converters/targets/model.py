"""An artifact that computes, and what it is asked.

Which engines there are is what entry-point group `dora_serve.engines` holds: name → a function
`(folder, base, run) -> Model`. This library registers those that are libraries (transformers,
PEFT), `dora_serve` those that it brings itself, so that nothing here knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TargetError

if TYPE_CHECKING:
    from ..model.base import BaseModel
    from ..run import Run

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reading:
    """What an engine computed, and how the same is asked of a transformers model.

    `values`: the artifact's, any shape. `measure(model)`: those of a transformers model.
    `top1(model, values)`: the share of its choices, with its `values`, that the engine made too.
    """

    values: torch.Tensor
    measure: Callable[[Any], torch.Tensor]
    top1: Callable[[Any, torch.Tensor], float]


@dataclass(frozen=True)
class Model:
    """An artifact in an engine. `read(inputs)`: what it computes for a batch of a model's inputs.

    `dtype`: what it stores or computes in. `rounded`: the weights hold the update, rounded to that
    torch dtype. `share`: how far it may be from the live model, as a share of the update's own
    effect; 0 for exact ones. `top1`: the least share of choices that must be equal.
    """

    read: Callable[[Inputs], Reading]
    dtype: str = "float32"
    rounded: torch.dtype | None = None
    share: float = 0.0
    top1: float = 1.0


def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    """All logits of a model, padded positions left out where they are per token."""
    with torch.inference_mode():
        output = model(**inputs)
    if "start_logits" in output:
        result = torch.stack([output.start_logits, output.end_logits])
        padded: torch.Tensor = result.masked_fill(inputs["attention_mask"] == 0, 0.0)
        return padded
    result = output.logits if "logits" in output else output.last_hidden_state
    ids = inputs.get("input_ids")
    if ids is not None and result.dim() == 3 and result.shape[:2] == ids.shape:
        result = result * inputs["attention_mask"].unsqueeze(-1)
    flat: torch.Tensor = result.float()
    return flat


def read_logits(model: Any) -> Callable[[Inputs], Reading]:
    """`Model.read` of a model that is called like a transformers model."""

    def read(inputs: Inputs) -> Reading:
        found = logits(model, inputs)
        return Reading(
            found,
            lambda other: logits(other, inputs),
            lambda _model, values: equal_choices(found, values),
        )

    return read


def equal_choices(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of equal argmax."""
    return float((one.argmax(-1) == other.argmax(-1)).double().mean())


def open_in(engine: str, folder: Path, base: BaseModel, run: Run) -> Model:
    """What is in `folder`, loaded in the installed engine of that name."""
    points = entry_points(group="dora_serve.engines", name=engine)
    if not points:
        raise TargetError("this engine is not installed", file=folder, found=engine)
    (point,) = points
    model: Model = point.load()(folder, base, run)
    return model
