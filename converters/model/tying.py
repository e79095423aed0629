"""Which tensors are one: what the class that transformers builds says, not what a name looks like.

A model class is built on the meta device to be asked, so ask only where an embedding, a head, or
another tensor that may be shared is at stake.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..errors import BaseError
from ..files.tensors import LazyTensor, LazyTensors
from .architecture import is_known, known_model
from .base import HEAD, BaseModel
from .names import Names
from .tasks import architecture_of, task_of


def aliases(model: Any) -> Mapping[str, str]:
    """Tensor name → the one it is tied to, for a model of transformers, both as in memory: what its
    class declares, and parameters that are one object."""
    found: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and name not in found and name not in found.values():
            found[name] = found.get(other, other)
    return {name: found.get(source, source) for name, source in found.items()}


def tied(config: Mapping[str, object]) -> Collection[str]:
    """The tensors in memory that are others under a second name, in the class that `config` (a
    `config.json`) names. Of a class that transformers does not have, what its configuration says.

    Raises `BaseError` where transformers makes no model of the configuration.
    """
    architecture = architecture_of(config)
    if not is_known(architecture, config):
        head = task_of(config) == "causal-lm" and config.get("tie_word_embeddings") is not False
        return [HEAD] if head else []
    return aliases(known_model(architecture, config)).keys()


def tensor_names(
    architecture: str, config: Mapping[str, object], num_labels: int | None
) -> list[str]:
    """The tensor names of the class, tied aliases and non-persistent buffers left out."""
    model = known_model(architecture, config, num_labels)
    one = aliases(model)
    return [name for name in model.state_dict() if name not in one]


def groups(base: BaseModel, architecture: str | None, num_labels: int | None) -> list[list[str]]:
    """The names in memory that are one tensor each, in the class `architecture`; first of each the
    one that the others are tied to."""
    if not is_known(architecture, base.config):
        head = HEAD in tied(base.config) and base.embedding is not None
        return [[str(base.embedding), HEAD]] if head else []
    return _grouped(aliases(known_model(str(architecture), base.config, num_labels)))


def spreading(
    tokens: Collection[str], base: BaseModel, architecture: str | None, num_labels: int | None
) -> frozenset[str]:
    """The modules of `tokens`, with single rows trained, whose rows are also those of what is tied
    to them.

    PEFT spreads those of the input embedding alone, and not where a tied side has rows of its own
    (`set_additional_trainable_modules`).
    """
    if not tokens or not is_known(architecture, base.config):
        return frozenset(tokens)
    model = known_model(str(architecture), base.config, num_labels)
    own = tied_in_peft(model)
    stay: set[str] = set()
    for group in _grouped(aliases(model)):
        sides = [name.removesuffix(".weight") for name in group]
        found = [
            token for token in tokens if any(f".{side}".endswith(f".{token}") for side in sides)
        ]
        if not found:
            continue
        if len(found) > 1 or own not in sides or not f".{own}".endswith(f".{found[0]}"):
            stay.update(found)
    return frozenset(tokens) - stay


def input_embedding(base: BaseModel) -> str | None:
    """The tensor on disk of the input embedding: by its usual names, else as the class says."""
    model = None
    if base.embedding is None:
        with suppress(BaseError):
            model = Names(base, architecture_of(base.config) or None).model
    name = None if model is None else embedding_in(model)
    return base.embedding if name is None else base.find(f"{name}.weight")


def embedding_in(model: Any) -> str | None:
    """The name in memory of a model's input embedding; None where it has none."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(embedding, torch.nn.Embedding):
        return None
    own: str = next(name for name, module in model.named_modules() if module is embedding)
    return own


def tied_in_peft(model: Any) -> str | None:
    """The input embedding, where PEFT takes others for tied to it: by what the whole model's
    configuration and its class say (`_get_module_names_tied_with_embedding`)."""
    said = model.config.to_dict().get("tie_word_embeddings")
    return embedding_in(model) if said and model._tied_weights_keys is not None else None


def new_embedding(base: BaseModel, replaced: LazyTensors) -> LazyTensor | None:
    """The input embedding among the tensors that a run trained whole."""
    known = input_embedding(base) if replaced else None
    return next((t for name, t in replaced.items() if known and base.find(name) == known), None)


def _grouped(one: Mapping[str, str]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name, source in one.items():
        found.setdefault(source, [source]).append(name)
    return list(found.values())
