"""The rows of a vocabulary that was resized for training, against the class that loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import BaseError
from ..files.tensors import LazyTensor, LazyTensors
from ..run import Run
from .architecture import known_model
from .base import BaseModel
from .match import classes
from .tying import input_embedding, new_embedding


def grown_by(base: BaseModel, embedding: LazyTensor | None) -> int:
    """How many rows a run's input `embedding` has more than the base's; 0 where it has none."""
    old = base.tensors.get(input_embedding(base) or "")
    return 0 if embedding is None or old is None else embedding.shape[0] - old.shape[0]


def resized(config: Mapping[str, object], more: int) -> dict[str, object]:
    """The configuration for an embedding of so many `more` rows, in every nested place of a text.

    A class may have more rows than its vocabulary has words."""
    sizes = {
        key: size + more
        for key in ("vocab_size", "decoder_vocab_size")
        if isinstance(size := config.get(key), int)
    }
    nested = {
        key: resized(inner, more)
        for key in ("text_config", "decoder", "encoder")
        if isinstance(inner := config.get(key), dict)
    }
    return {**config, **sizes, **nested}


def check_rows(
    run: Run,
    base: BaseModel,
    architecture: str | None,
    replaced: LazyTensors,
    shapes: Mapping[str, tuple[int, ...]],
    find: Callable[[str], str | None],
) -> None:
    """Raise `BaseError` where what is written, name → shape, does not fit its class.

    That is a tensor that has not the rows of the run's vocabulary where its class has them, such as
    a head's bias of the base's vocabulary, or has them where its class has not; and one of the
    run's `replaced` whose shape is neither the base's nor that of the class. `find` gives a
    tensor's name in the base.
    """
    embedding = new_embedding(base, replaced)
    held = {name: base.tensors.get(find(name) or "") for name in replaced}
    other = {n for n, t in held.items() if t is not None and t.shape != replaced[n].shape}
    if embedding is None and not other:
        return
    rows = None if embedding is None else embedding.shape[0]
    known = architecture is not None and classes(run.task, run.num_labels, base).known
    more = grown_by(base, embedding)
    grown = more != 0
    if architecture is None or not known or not (grown or other):
        return
    config = resized(base.config, more)
    state = known_model(architecture, config, run.num_labels).state_dict()
    for name, found in shapes.items():
        expected = tuple(state[name].shape) if name in state else None
        if expected is None or found == expected:
            continue
        if (grown and rows in (*expected, *found)) or name in other:
            raise BaseError(
                "the run has another vocabulary than the base, and does not hold this tensor of it"
                if grown
                else "the run holds a tensor of another shape than the base's class has",
                file=base.path,
                tensor=name,
                found=list(found),
                expected=list(expected),
                remedy="make the base as for training (resize_token_embeddings, or from_pretrained "
                "with num_labels), save it, and pass it with `base`",
            )
