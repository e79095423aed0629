"""The unmerged model: a transformers model with its updates attached, as training ran it.

It is the truth that every artifact is compared with, so it takes a way of its own: transformers
loads the base, and the updates act as branches beside the layers, never inside the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from converters.errors import RunError
from converters.files.tensors import rows_and_columns
from converters.model.base import HEAD, BaseModel
from converters.model.layout import Layout, Place
from converters.model.match import target_architecture
from converters.run import Run
from converters.targets.opening import load_base
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update, convolution_matrix

Slot = tuple[torch.nn.Module, str]  # a module and the name of its parameter


class LiveModel:
    """The live model of a run in float32, eval mode. `detach()` leaves the updates out.

    Sums of rank-1 components act as branches beside the layers. Other updates, and those of
    parameters that are no layer's weight (fused experts, biases), have no form beside the weight:
    there the layer computes with the deployed weight.
    """

    def __init__(self, run: Run, base: BaseModel) -> None:
        self.model = load_base(run, base)
        _load_run_tensors(self.model, run)
        self._run = run
        architecture, _ = target_architecture(run, base)
        self._layout = Layout(base, architecture, run.num_labels)
        self._undo: list[Callable[[], object]] = []
        deployed = []
        for name in run.updates:
            components = run.updates[name].components()
            layer = self._layer(name)
            plain = isinstance(layer, torch.nn.Linear | torch.nn.Embedding) or _is_conv1d(layer)
            if plain and components is not None and name not in run.tied:
                hook = _branch(components, name in run.embeddings)
                self._undo.append(layer.register_forward_hook(hook).remove)
            else:
                deployed.append(name)
        for (owner, attribute), weight in self._deployed(deployed).items():
            self._undo.append(_replace(owner, attribute, weight))

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
            for (owner, attribute), weight in self._deployed(list(self._run.updates)).items():
                # A weight of its own: what it is tied to does not get the update.
                _replace(owner, attribute, weight)
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(dtype))

    def _layer(self, name: str) -> Any:
        """The module of that name where it has a weight, else None."""
        try:
            layer = self.model.get_submodule(name)
        except AttributeError:
            return None
        return layer if hasattr(layer, "weight") else None

    def _deployed(self, names: list[str]) -> dict[Slot, torch.Tensor]:
        """The parameters that `names` update, with the updates in them, as the model stores them,
        float32."""
        result: dict[Slot, torch.Tensor] = {}
        for name in names:
            update = self._run.updates[name]
            owner, attribute, place = self._place(name, update)
            own = getattr(owner, attribute)
            if (owner, attribute) not in result:
                copy = own.detach().clone(memory_format=torch.contiguous_format)
                result[owner, attribute] = copy
            matrix = result[owner, attribute].view(-1, place.columns)
            _update(matrix[place.start : place.start + place.rows], update, place.transposed)
            if name in self._run.tied:
                shared = self.model.named_parameters(remove_duplicate=False)
                for other in [n for n, parameter in shared if parameter is own]:
                    module, _, kind = other.rpartition(".")
                    result[self.model.get_submodule(module), kind] = result[owner, attribute]
        return result

    def _place(self, name: str, update: Update) -> tuple[Any, str, Place]:
        layer = self._layer(name)
        if layer is not None:
            shape = tuple(layer.weight.shape)
            matrix = convolution_matrix if len(shape) > 2 else rows_and_columns
            rows, columns = matrix(shape)
            return layer, "weight", Place(f"{name}.weight", 0, rows, columns, _is_conv1d(layer))
        place = self._layout.place(name, update.shape)
        if place is None:
            raise RunError("the model has no such module", file=self._run.path, tensor=name)
        owner, _, attribute = place.parameter.rpartition(".")
        return self.model.get_submodule(owner), attribute, place


def _is_conv1d(layer: object) -> bool:
    return type(layer).__name__ == "Conv1D"  # transformers' own, stored as [in, out]


def _update(rows: torch.Tensor, update: Update, transposed: bool) -> None:
    """Put `update` into the stored weight `rows`, in place."""
    weight = rows.T.contiguous() if transposed else rows
    components = update.components()
    if components is None:
        weight = update.merge(weight, 0)
    else:
        delta = (components.b.double() * components.c.double()) @ components.a.double()
        weight = (weight.double() + delta).float()
    rows.copy_(weight.T if transposed else weight)


def _replace(owner: torch.nn.Module, attribute: str, weight: torch.Tensor) -> Callable[[], object]:
    """Give `owner` another parameter; returns what gives it back its own."""
    own = getattr(owner, attribute)
    setattr(owner, attribute, torch.nn.Parameter(weight, requires_grad=False))
    return lambda: setattr(owner, attribute, own)


def _load_run_tensors(model: Any, run: Run) -> None:
    """Put in the tensors the run brings: its heads, and a checkpoint's own frozen weights."""
    brought = {**(run.embedded_base or {}), **run.replaced}
    state = model.state_dict(keep_vars=True)
    head = state.get(HEAD)
    one_side = head is not None and any(state.get(name) is head for name in brought)
    if run.embedded_base is None and one_side:
        # One side of a tied pair, trained alone, is a tensor of its own from then on.
        model.lm_head.weight = torch.nn.Parameter(head.detach().clone())
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
