"""The unmerged model: what training left, computed without ever being merged.

It is the truth that every artifact is compared with, so nothing of what writes artifacts is in it:
transformers builds, ties and loads the base; PEFT puts its own layers into it where it made the
run, and otherwise the updates act as branches beside the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from converters.errors import RunError
from converters.files.json_files import read_json
from converters.files.tensors import LazyTensor, is_copy_of, rows_and_columns
from converters.model.base import BaseModel
from converters.model.layout import Layout, Place
from converters.model.match import class_trained, resolved, target_architecture
from converters.readers.peft_laid import laid_otherwise
from converters.readers.unsloth import laid_by_expert
from converters.run import Run
from converters.targets.merged.requantized import Blocks
from converters.targets.opening import Loaded, attach, load
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update, convolution_matrix

Slot = tuple[torch.nn.Module, str]  # a module and the name of its parameter

_CONFIG = "adapter_config.json"
_SUMS = 2.0**-18  # of a row's largest weight: how far two sums in float32 lie apart
# What PEFT puts into the name of a parameter that it wraps.
_PEFTS = re.compile(r"\.(?:base_layer|token_adapter|original_module|modules_to_save\.[^.]+)(?=\.)")


class Truth(Protocol):
    """The live model of a run in float32, eval mode.

    `loaded`: what transformers said of loading the base.
    """

    @property
    def name(self) -> str:
        """Who computes it."""

    loaded: Loaded

    @property
    def model(self) -> Any:
        """The model of transformers that computes."""

    def detach(self) -> None:
        """Take the updates off: the base with the run's heads, the negative control."""

    def folded(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Fold the updates into the weights, one by one: the weight before and after, of those that
        change. What a weight is tied to does not get its update."""


def truth_of(run: Run, base: BaseModel) -> Truth:
    """PEFT's own model where PEFT made the run and loads its folder as it is; else ours."""
    if _is_peft(run):
        own = class_trained(run, base).names.architecture
        text = None if own == target_architecture(run, base)[0] else own
        # In the model without its head PEFT does not see what trained rows are tied to.
        for inside in (False,) if run.tied else (False, True):
            truth = PeftTruth.of(run, base, inside, text)
            if truth is not None:
                return truth
    return LiveModel(run, base)


def fold_rounded(
    truth: Truth,
    dtype: torch.dtype,
    own: Mapping[str, torch.dtype | Blocks],
    stored: Mapping[str, LazyTensor],
) -> float:
    """Make of `truth` what a merged model of `dtype` is expected to hold: the updates in the
    weights, every weight rounded once, those that `own` names to what it says: to float8 by blocks
    only where there is an update, since the others are in such blocks as they were. On which side
    of a tie sums in float32 come to lie hangs on their order: there both are right, and what the
    model has, `stored`, is taken. Returns the largest change of one weight by rounding, as a share
    of its update.
    """
    lost = [0.0]
    with torch.no_grad():
        moved = {after.data_ptr(): (after - before).norm() for before, after in truth.folded()}
        for name, parameter in truth.model.named_parameters():
            plain = _PEFTS.sub("", name)
            to = own.get(plain, dtype)
            update = moved.get(parameter.data_ptr())
            if isinstance(to, torch.dtype):
                rounded = parameter.to(to).float()
                if update and plain in stored:
                    rounded = _either_side(parameter, rounded, stored[plain].load().float())
            else:
                rounded = _in_float8(parameter, to) if update else parameter
            if update:
                lost.append(float((rounded - parameter).norm() / update))
            parameter.copy_(rounded)
    return max(lost)


def _either_side(weight: torch.Tensor, rounded: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`rounded`, and `other` where it is as near to `weight` but for the order of sums."""
    if other.shape != weight.shape:
        return rounded
    sums = _SUMS * weight.abs().amax(-1, keepdim=True)
    either = (weight - other).abs() <= (weight - rounded).abs() + sums
    return torch.where(either, other, rounded)


def _in_float8(weight: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The matrix, or each of several, rounded block by block."""
    rounded = weight.clone()
    for matrix in rounded.view(-1, *weight.shape[-2:]):
        for band in matrix.split(blocks.rows, 0):
            for block in band.split(blocks.columns, 1):
                scale = block.abs().max() / 448
                if scale == 0:
                    continue
                scale = 2 ** scale.log2().ceil() if blocks.powers else scale
                scale = scale.to(blocks.kept).float()
                near = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                block.copy_(near.float() * scale)
    return rounded


class PeftTruth:
    """The model that PEFT makes of the base and the run's folder."""

    name = "peft"

    def __init__(self, loaded: Loaded, adapted: Loaded) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        self.loaded, self._adapted = loaded, adapted
        modules = list(adapted.model.modules())
        self._layers = [m for m in modules if isinstance(m, BaseTunerLayer)]
        self._switched = [
            *self._layers,
            *(
                module
                for module in modules
                if hasattr(module, "_disable_adapters")
                and not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
            ),
        ]

    @classmethod
    def of(cls, run: Run, base: BaseModel, inside: bool, text: str | None) -> PeftTruth | None:
        """None where PEFT does not load every tensor of the run, and nothing else, as it is.

        `text`: the class of the text model alone, where the run was trained in that; None too
        where transformers does not find that in the base.
        """
        loaded = load(run, base, architecture=text)
        if text is not None and loaded.missing:
            return None
        own = {
            name: parameter.detach().clone()
            for name, parameter in loaded.model.named_parameters()
            if name in run.replaced
        }
        try:
            adapted = attach(loaded.model, run.path, inside=inside)
        except Exception:
            return None
        for name, parameter in adapted.model.named_parameters():
            # An adapter on an embedding may carry its weight along, untouched but for being
            # rounded as the adapter is.
            kept = own.get(plain := _PEFTS.sub("", name))
            if kept is None:
                continue
            if torch.equal(kept.to(run.replaced[plain].dtype).float(), parameter):
                parameter.data = kept
        return None if adapted.missing or adapted.unexpected else cls(loaded, adapted)

    @property
    def model(self) -> Any:
        return self._adapted.model

    def detach(self) -> None:
        for module in self._switched:
            module.enable_adapters(False)

    def folded(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for module in self._switched:
            module.enable_adapters(True)
        # PEFT's layers of single rows come first.
        for layer in sorted(
            self._layers, key=lambda one: not hasattr(one, "trainable_tokens_delta")
        ):
            inner = layer.get_base_layer()
            if hasattr(inner, "token_adapter"):  # PEFT would merge into a copy of it
                layer.base_layer = inner = inner.token_adapter.get_base_layer()
            own = dict(inner.named_parameters(recurse=False))
            for name, parameter in own.items():
                copy = parameter.detach().clone(memory_format=torch.contiguous_format)
                setattr(inner, name, torch.nn.Parameter(copy, requires_grad=False))
            with torch.no_grad():
                layer.merge()
            for name, parameter in own.items():
                after = getattr(inner, name)
                if not torch.equal(parameter, after):
                    yield parameter, after


class LiveModel:
    """The live model by branches.

    Sums of rank-1 components act as branches beside the layers. Other updates, and those of
    parameters that are no layer's weight (fused experts, biases), have no form beside the weight,
    nor has an embedding that scales: there the layer computes with the deployed weight.
    """

    name = "live"

    def __init__(self, run: Run, base: BaseModel) -> None:
        run = resolved(run, base)
        self.loaded = load(run, base)
        self.model = self.loaded.model
        _load_run_tensors(self.model, run, base)
        self._run = run
        architecture, _ = target_architecture(run, base)
        self._layout = Layout(base, architecture, run.num_labels)
        self._undo: list[Callable[[], object]] = []
        deployed = []
        for name in run.updates:
            components = run.updates[name].components()
            layer = self._layer(name)
            plain = isinstance(layer, torch.nn.Linear) or _is_conv1d(layer) or _looks_up(layer)
            if plain and components is not None and name not in run.tied:
                hook = _branch(components, _looks_up(layer))
                self._undo.append(layer.register_forward_hook(hook).remove)
            else:
                deployed.append(name)
        for (owner, attribute), (_, weight) in self._deployed(deployed).items():
            self._undo.append(_replace(owner, attribute, weight))

    def detach(self) -> None:
        """Take the updates off: the base with the run's heads, the negative control."""
        for undo in self._undo:
            undo()
        self._undo = []

    def folded(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rank-1 sums are added in float64."""
        self.detach()
        for (owner, attribute), (own, weight) in self._deployed(list(self._run.updates)).items():
            # A weight of its own: what it is tied to does not get the update.
            _replace(owner, attribute, weight)
            if not torch.equal(own, weight):
                yield own, weight

    def _layer(self, name: str) -> Any:
        """The module of that name where it has a weight, else None."""
        try:
            layer = self.model.get_submodule(name)
        except AttributeError:
            return None
        return layer if hasattr(layer, "weight") else None

    def _deployed(self, names: list[str]) -> dict[Slot, tuple[torch.Tensor, torch.Tensor]]:
        """The parameters that `names` update, without and with the updates in them, as the model
        stores them, float32."""
        result: dict[Slot, tuple[torch.Tensor, torch.Tensor]] = {}
        # What reaches all that is tied comes first; the sides have weights of their own then.
        for name in sorted(names, key=lambda name: name not in self._run.tied):
            update = self._run.updates[name]
            owner, attribute, place = self._place(name, update)
            own = getattr(owner, attribute)
            if (owner, attribute) not in result:
                copy = own.detach().clone(memory_format=torch.contiguous_format)
                result[owner, attribute] = own, copy
            matrix = result[owner, attribute][1].view(-1, place.columns)
            _update(matrix[place.start : place.start + place.rows], update, place.transposed)
            if name in self._run.tied:
                shared = self.model.named_parameters(remove_duplicate=False)
                for other in [n for n, parameter in shared if parameter is own]:
                    module, _, kind = other.rpartition(".")
                    slot = self.model.get_submodule(module), kind
                    if slot != (owner, attribute):
                        result[slot] = own, result[owner, attribute][1].clone()
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


def _is_peft(run: Run) -> bool:
    """Whether the folder of `run` is all of it, and PEFT's: not fitted, not in parts, with a scale
    that the folder says, and of a version that laid its factors as today's."""
    file = run.path / _CONFIG
    ours = run.fit is not None or not run.method.startswith("peft_") or " + " in run.method
    if ours or not file.is_file() or find_spec("peft") is None:
        return False
    config = read_json(file)
    if laid_otherwise(config) or laid_by_expert(config):
        return False
    # What PEFT imports by the name that a configuration gives is never imported here.
    return (config.get("peft_type") != "LORA" or "lora_alpha" in config) and not config.get(
        "megatron_config"
    )


def _looks_up(layer: object) -> bool:
    """Whether a layer is an embedding that does nothing else, such as scale what it found."""
    return getattr(type(layer), "forward", None) is torch.nn.Embedding.forward


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


def _load_run_tensors(model: Any, run: Run, base: BaseModel) -> None:
    """Put in the tensors the run brings: its heads, and a checkpoint's own frozen weights but those
    that are the base's, rounded.

    What an adapter brings is a tensor of its own from then on, whatever transformers tied it to: so
    PEFT trains it. A checkpoint was saved by a model that kept its ties.
    """
    brought = {**(run.embedded_base or {}), **run.replaced}
    if run.embedded_base is not None:
        brought = {n: t for n, t in brought.items() if not _is_rounded(t, base, base.find(n))}
    state = model.state_dict(keep_vars=True)
    for name, tensor in brought.items():
        if name not in state:
            raise RunError(
                "the model has no such tensor",
                file=tensor.path,
                tensor=name,
                remedy="is this the base the run was trained on?",
            )
        if run.embedded_base is None and isinstance(state[name], torch.nn.Parameter):
            owner, _, attribute = name.rpartition(".")
            value = tensor.load().to(torch.float32)
            _replace(model.get_submodule(owner), attribute, value.reshape(state[name].shape))
        else:
            with torch.no_grad():
                state[name].copy_(tensor.load())


def _is_rounded(tensor: LazyTensor, base: BaseModel, own: str | None) -> bool:
    """Whether `tensor` holds no more than the base's, which are deployed in its place."""
    if own is None or tensor.dtype.itemsize >= base.tensors[own].dtype.itemsize:
        return False
    return is_copy_of(tensor, base.tensors[own])


def _branch(
    update: RankOneSum, embedding: bool
) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    def add(
        _layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        a, b, c = (part.to(output.dtype) for part in (update.a, update.b, update.c))
        if embedding:
            hidden = torch.nn.functional.embedding(inputs[0], b) * c
            return output + hidden @ a
        hidden = torch.nn.functional.linear(inputs[0], a) * c
        return output + torch.nn.functional.linear(hidden, b)

    return add
