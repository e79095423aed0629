"""The unmerged model: a transformers model with its updates attached, as training ran it.

It is the truth that every artifact is compared with, so it takes a way of its own: transformers
loads the base, and the updates act as branches beside the layers, never inside the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from converters.base import BaseModel
from converters.errors import RunError
from converters.plan import target_architecture
from converters.run import Run
from converters.update import RankOneSum, Update


class LiveModel:
    """The live model of a run in float32, eval mode. `detach()` leaves the updates out.

    Sums of rank-1 components act as branches beside the layers. Other updates have no form beside
    the weight: there the layer computes with the deployed weight.
    """

    def __init__(self, run: Run, base: BaseModel) -> None:
        self.model = load_base(run, base)
        _load_run_tensors(self.model, run)
        self._run = run
        self._undo: list[Callable[[], object]] = []
        for module in run.updates:
            layer, update = self.model.get_submodule(module), run.updates[module]
            components = update.components()
            if components is None:
                self._undo.append(_replace(layer, _deployed(layer, update)))
            else:
                hook = _branch(components, module in run.embeddings)
                self._undo.append(layer.register_forward_hook(hook).remove)

    def detach(self) -> None:
        """Take the updates off: the base with the run's heads, the negative control."""
        for undo in self._undo:
            undo()
        self._undo = []

    def fold_rounded(self, dtype: torch.dtype) -> None:
        """Fold the updates into the weights, rank-1 sums in float64, every weight rounded once.

        This is what a merged model of `dtype` is expected to hold.
        """
        self.detach()
        with torch.no_grad():
            for module in self._run.updates:
                layer = self.model.get_submodule(module)
                # A weight of its own: what it is tied to does not get the update.
                _replace(layer, _deployed(layer, self._run.updates[module]))
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(dtype))


def _deployed(layer: torch.nn.Module, update: Update) -> torch.Tensor:
    """The weight of `layer` with the update in it, as the layer stores it, float32."""
    weight = layer.get_parameter("weight").detach()
    conv1d = type(layer).__name__ == "Conv1D"
    rows = weight.T.clone(memory_format=torch.contiguous_format) if conv1d else weight.clone()
    components = update.components()
    if components is None:
        update.merge(rows, 0)
    else:
        delta = (components.b.double() * components.c.double()) @ components.a.double()
        rows = (rows.double() + delta).float()
    return rows.T if conv1d else rows


def _replace(layer: torch.nn.Module, weight: torch.Tensor) -> Callable[[], object]:
    """Give `layer` another weight; returns what gives it back its own."""
    own = layer.get_parameter("weight")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def undo() -> None:
        layer.weight = own

    return undo


def load_base(run: Run, base: BaseModel) -> Any:
    """The base as transformers loads it, float32, in the class the run was trained in."""
    import transformers

    architecture, _ = target_architecture(run, base)
    config = transformers.AutoConfig.from_pretrained(base.path)
    if run.num_labels is not None:
        config.num_labels = run.num_labels
    cls = getattr(transformers, architecture) if architecture else transformers.AutoModel
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a head that the run brings is missing in the base
    transformers.logging.disable_progress_bar()
    try:
        return cls.from_pretrained(base.path, config=config, dtype=torch.float32).eval()
    finally:
        transformers.logging.set_verbosity(level)


def _load_run_tensors(model: Any, run: Run) -> None:
    """Put in the tensors the run brings: its heads, and a checkpoint's own frozen weights."""
    brought = {**(run.embedded_base or {}), **run.replaced}
    state = model.state_dict()
    head = "lm_head.weight"
    if run.embedded_base is None and head in brought and head in state:
        # A head that was trained beside a tied embedding is a tensor of its own from then on.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        state = model.state_dict()
    with torch.no_grad():
        for name, tensor in brought.items():
            if name not in state:
                raise RunError(
                    "the model has no such tensor",
                    file=tensor.path,
                    tensor=name,
                    remedy="is this the base the run was trained on?",
                )
            state[name].copy_(tensor.load())


def _branch(
    update: RankOneSum, embedding: bool
) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    def add(
        _layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        if embedding:
            hidden = torch.nn.functional.embedding(inputs[0], update.b) * update.c
            return output + hidden @ update.a
        hidden = torch.nn.functional.linear(inputs[0], update.a) * update.c
        return output + torch.nn.functional.linear(hidden, update.b)

    return add
