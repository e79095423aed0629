"""The update between two models of one architecture, as a run.

Names are those of the tuned model in memory, whatever they are on disk. Not read: changed tensors
that loading joins to one in memory (experts), or takes apart to others than linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import BaseError, TargetError
from .files.tensors import LazyTensor, is_copy_of, load_finite
from .model.architecture import known_model
from .model.base import HEAD, BaseModel
from .model.called import is_called
from .model.layout import Layout
from .model.tasks import HEADS, TASKS, architecture_of, task_of
from .model.tying import aliases
from .run import LazyUpdates, Run
from .updates.replaced import Replacement
from .updates.update import Update

ENERGY = 0.999  # what an extracted adapter keeps of every module by default


def difference(tuned: BaseModel, base: BaseModel) -> Run:
    """What `tuned` changed of `base`: an update for every linear layer whose weight differs,
    every other tensor that differs (norms, biases, embeddings, heads of a task) whole.

    Tensors that only `base` has are of no use to `tuned` and left out. Raises `DoraExportError`
    when the models are of different kinds.
    """
    if tuned.config.get("model_type") != base.config.get("model_type"):
        raise BaseError(
            "the models are of different families",
            file=base.path,
            found=base.config.get("model_type"),
            expected=tuned.config.get("model_type"),
            remedy="pass the base that the model was tuned from with `base`",
        )
    architecture, task = _architecture(tuned, base)
    own = architecture_of(base.config)
    labels = tuned.config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else 2
    num_labels = count if task in ("sequence-classification", "token-classification") else None
    model = known_model(architecture, tuned.config, num_labels)
    linear = _linear_layers(model, task)
    start = known_model(architecture, base.config, num_labels)  # which may tie otherwise
    now, then = (
        _Stored(each, Layout(each, architecture, num_labels), aliases(made))
        for each, made in ((tuned, model), (base, start))
    )

    layers: dict[str, LazyTensor] = {}
    whole: dict[str, LazyTensor] = {}
    unread = dict(tuned.tensors)
    for name in model.state_dict():
        tensor, tied = now.find(name)
        before, _ = then.find(name)
        if tensor is None and name.rpartition(".")[0] in linear:
            tensor, tied, before = now.part(name), False, before or then.part(name)
            for joined in now.layout.members(name):
                unread.pop(joined, None)
        if tensor is None:
            continue
        unread.pop(tensor.name, None)
        if before is not None and is_copy_of(tensor, before):
            continue
        module = name.removesuffix(".weight")
        fits = before is not None and before.shape == tensor.shape
        if fits and module in linear and not tied and is_called(module, (), base):
            layers[module] = tensor
        else:
            whole[name] = tensor
    _refuse(tuned, base, unread)
    # A module with a parameter of its own is stored whole, and what is inside of it too.
    owners = {name.rpartition(".")[0] for name in whole if not name.endswith(".bias")}
    inside = [module for module in layers if not owners.isdisjoint(_holders(module))]
    if inside and len(inside) == len(layers):
        raise TargetError(
            "all layers that changed are inside of modules with a changed parameter of their own, "
            "which an adapter holds whole",
            file=tuned.path,
            found=", ".join(sorted(owners.intersection(_holders(inside[0])))),
            remedy="deploy the tuned model itself",
        )
    whole |= {f"{module}.weight": layers.pop(module) for module in inside}
    updates = {module: _loader(tensor, linear[module]) for module, tensor in layers.items()}
    return Run(
        path=tuned.path,
        method="difference",
        updates=LazyUpdates(updates),
        replaced=whole,
        apart=frozenset(whole),
        base=base.name,
        # PEFT's class for a task gives the model text, asked or not.
        task=task if model.main_input_name == "input_ids" or architecture != own else None,
        num_labels=num_labels,
        files=(*tuned.shards, tuned.path / "config.json"),
    )


def _architecture(tuned: BaseModel, base: BaseModel) -> tuple[str, str | None]:
    """The class of the tuned model and its task; None where it is the base's own class."""
    name, own = architecture_of(tuned.config), architecture_of(base.config)
    task = task_of(tuned.config)
    # What fills in words has no task to name, and without one the base's pooling says embeddings.
    pooled = base.task != task_of(base.config)
    if not name or (task is None and (name != own or pooled)):
        raise TargetError(
            "no adapter can name the class of the tuned model",
            file=tuned.path / "config.json",
            found=name or "no architectures",
            expected=f"{own}, or a class for " + ", ".join(TASKS),
            remedy="pass a copy of the base without modules.json" if pooled else None,
        )
    return name, task


@dataclass(frozen=True)
class _Stored:
    """The tensors of a model under their names in memory. `one`: name → what it is tied to."""

    model: BaseModel
    layout: Layout
    one: Mapping[str, str]

    def find(self, name: str) -> tuple[LazyTensor | None, bool]:
        """The tensor that is loaded as `name`, and whether it is another one's that `name` is tied
        to. None where the file has neither."""
        tensors, own = self.model.tensors, self.layout.find(name)
        if own is not None:
            return tensors[own], False
        source = self.layout.find(self.one.get(name, ""))
        source = source or (self.model.embedding if name == HEAD and name in self.one else None)
        return (None if source is None else tensors[source]), True

    def part(self, name: str) -> LazyTensor | None:
        """The tensor `name`, which loading takes out of one that joins several; None where it is
        made otherwise."""
        return self.layout.tensor(name) if len(self.layout.members(name)) == 1 else None


def _linear_layers(model: Any, task: str | None) -> dict[str, bool]:
    """Linear module name → whether its weight is stored as `[in, out]`; the head of a classifier
    is left out, which engines load whole."""
    body = f"{model.base_model_prefix}."
    return {
        name: conv1d
        for name, layer in model.named_modules()
        if (conv1d := type(layer).__name__ == "Conv1D") or isinstance(layer, torch.nn.Linear)
        if name.startswith(body) or task not in HEADS
    }


def _holders(module: str) -> list[str]:
    """The modules that `module` is inside of."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _loader(tensor: LazyTensor, transposed: bool) -> Callable[[], Update]:
    def load() -> Update:
        weight = load_finite(tensor)
        return Replacement(weight.T.contiguous() if transposed else weight)

    return load


def _refuse(
    tuned: BaseModel,
    base: BaseModel,
    unread: dict[str, LazyTensor],
) -> None:
    """Raise `TargetError` for changes that an adapter cannot carry."""
    embedding = tuned.tensors.get(tuned.embedding or "")
    old = base.tensors.get(base.embedding or "")
    if embedding is not None and old is not None and embedding.shape != old.shape:
        raise TargetError(
            "the tuned model has another vocabulary",
            file=embedding.path,
            tensor=embedding.name,
            found=list(embedding.shape),
            expected=list(old.shape),
            remedy="deploy the tuned model itself",
        )
    for name, tensor in unread.items():
        before = base.tensors.get(base.find(name) or "")
        if before is None or not is_copy_of(tensor, before):
            raise TargetError(
                "a changed tensor is no tensor of its own in the model in memory",
                file=tensor.path,
                tensor=name,
                remedy="deploy the tuned model itself",
            )
