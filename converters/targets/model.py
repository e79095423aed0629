"""An artifact that computes, and what it is asked.

Which engines there are is what entry-point group `dora_serve.engines` holds: name → a function
`(folder, base, run) -> Model`. This library registers those that are libraries (transformers,
PEFT), `dora_serve` those that it brings itself, so that nothing here knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TargetError

if TYPE_CHECKING:
    from ..files.tensors import LazyTensor
    from ..model.base import BaseModel
    from ..run import Run
    from .merged.requantized import Blocks

Inputs = dict[str, torch.Tensor]
# The first there is compared.
_OUTPUTS = (
    *("logits", "logits_per_image", "itm_score", "spectrogram", "waveform", "loss"),
    *("last_hidden_state", "reconstruction", "embeddings"),
)
_BESIDE = ("pred_boxes", "pred_masks")


@dataclass(frozen=True)
class Reading:
    """What an engine computed, and how the same is asked of a transformers model.

    `values`: the artifact's, of any shapes. `measure(model)`: those of a transformers model.
    `top1(model, values)`: for a bound, the share of its choices, with its `values`, that the engine
    made too; what is as likely within the bound counts as the same choice.
    """

    values: Sequence[torch.Tensor]
    measure: Callable[[Any], Sequence[torch.Tensor]]
    top1: Callable[[Any, Sequence[torch.Tensor]], Callable[[float], float]]


@dataclass(frozen=True)
class Model:
    """An artifact in an engine. `read(batches)`: what it computes for batches of a model's inputs.

    `dtype`: what it stores or computes in. `rounded`: the weights hold the update, rounded to that
    torch dtype, or to what `own` names for a parameter; `stored` has those parameters that are one
    tensor of its files. `share`: how far it may be from the
    live model, as a share of the update's own effect; 0 for exact ones. `top1`: the least share of
    choices that must be equal. `missing`, `unexpected`: tensors that the engine reports it did not
    find, or found no place for.
    """

    read: Callable[[Sequence[Inputs]], Reading]
    dtype: str = "float32"
    rounded: torch.dtype | None = None
    own: Mapping[str, torch.dtype | Blocks] = field(default_factory=dict)
    stored: Mapping[str, LazyTensor] = field(default_factory=dict)
    share: float = 0.0
    top1: float = 1.0
    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()


def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    """All logits of a model, padded positions left out where they are per token."""
    return answers(model, inputs)[0]


def answers(model: Any, inputs: Inputs) -> list[torch.Tensor]:
    """The logits of a model, and what its class finds beside them."""
    if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
        inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    # In inference mode PEFT cannot merge, as some of its layers do. Some models draw lots.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(**inputs)
    if "start_logits" in output:
        result = torch.stack([output.start_logits, output.end_logits])
        padded: torch.Tensor = result.masked_fill(inputs["attention_mask"] == 0, 0.0).float()
        return [padded]
    found = [output[name] for name in (*_OUTPUTS, *output) if name in output]
    several = [value if isinstance(value, tuple) else (value,) for value in found]
    result = next(each[0] for each in several if each and _is_float(each[0]))
    ids = inputs.get("input_ids")
    if ids is not None and result.dim() == 3 and result.shape[:2] == ids.shape:
        result = result * inputs["attention_mask"].unsqueeze(-1)
    if ids is None and "pooler_output" in output:  # what comes after the hidden states
        result = torch.cat([result.flatten(1), output.pooler_output.flatten(1)], dim=1)
    beside = [output[name] for name in _BESIDE if name in output]
    return [each.float() if each.dim() else each.float()[None] for each in (result, *beside)]


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def read_logits(model: Any) -> Callable[[Sequence[Inputs]], Reading]:
    """`Model.read` of a model that is called like a transformers model."""

    def read(batches: Sequence[Inputs]) -> Reading:
        def ask(other: Any) -> list[torch.Tensor]:
            return [answer for inputs in batches for answer in answers(other, inputs)]

        found = ask(model)
        return Reading(
            found,
            ask,
            lambda _model, values: partial(equal_choices, found, values),
        )

    return read


def equal_choices(
    found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], within: float = 0.0
) -> float:
    """The share of positions whose largest number in `found` is the largest in `truth` too, or
    less than `within` on either side away from it."""
    same = []
    for one, other in zip(found, truth, strict=True):
        chosen = other.gather(-1, one.argmax(-1, keepdim=True)).squeeze(-1)
        same.append((chosen >= other.amax(-1) - 2 * within).flatten())
    return float(torch.cat(same).double().mean())


def open_in(engine: str, folder: Path, base: BaseModel, run: Run) -> Model:
    """What is in `folder`, loaded in the installed engine of that name."""
    points = entry_points(group="dora_serve.engines", name=engine)
    if not points:
        raise TargetError("this engine is not installed", file=folder, found=engine)
    (point,) = points
    model: Model = point.load()(folder, base, run)
    return model
