"""Which tensors are one: what the class that transformers builds says, not what a name looks like.

A model class is built on the meta device to be asked, so ask only where an embedding, a head, or
another tensor that may be shared is at stake.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..files.tensors import LazyTensor, LazyTensors, same_values
from ..run import Run
from .architecture import empty_model
from .base import HEAD, BaseModel
from .tasks import architecture_of, task_of


def aliases(model: Any) -> Mapping[str, str]:
    """Tensor name → the one it is tied to, for a model of transformers, both as in memory."""
    known = getattr(model, "all_tied_weights_keys", None)
    if known is not None:
        return dict(known)
    first: dict[int, str] = {}  # transformers 4 only shares the parameters
    named = [(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: first[i] for i, name in named if first.setdefault(i, name) != name}


def tied(config: Mapping[str, object]) -> Collection[str]:
    """The tensors in memory that are others under a second name, in the class that `config` (a
    `config.json`) names. Of a class that transformers does not have, what its configuration says.

    Raises `BaseError` where transformers makes no model of the configuration.
    """
    import transformers

    architecture = architecture_of(config)
    if architecture and not hasattr(transformers, architecture):
        head = task_of(config) == "causal-lm" and config.get("tie_word_embeddings") is not False
        return [HEAD] if head else []
    return aliases(empty_model(architecture, config)).keys()


def tensor_names(
    architecture: str, config: Mapping[str, object], num_labels: int | None
) -> list[str]:
    """The tensor names of the class, tied aliases and non-persistent buffers left out."""
    model = empty_model(architecture, config, num_labels)
    return [name for name in model.state_dict() if name not in aliases(model)]


def new_embedding(base: BaseModel, replaced: LazyTensors) -> LazyTensor | None:
    """The input embedding among the tensors that a run trained whole."""
    known = base.embedding
    return next((t for name, t in replaced.items() if known and base.find(name) == known), None)


def copy_of_embedding(run: Run, base: BaseModel) -> str | None:
    """A tied head that is stored all the same, where the run changes both: it would keep the old
    values, and a head that differs is not tied when the model is loaded."""
    head, embedding = base.tensors.get(HEAD), base.tensors.get(base.embedding or "")
    if not run.tied or head is None or embedding is None or head is embedding:
        return None
    one = HEAD not in run.replaced and HEAD in tied(base.config)
    return HEAD if one and same_values(head, embedding) else None
