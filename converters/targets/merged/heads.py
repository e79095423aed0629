"""Heads of a merged model that some engine has no place for."""

from __future__ import annotations

from collections.abc import Iterator

from ...model.base import HEAD, BaseModel
from ...model.tying import tied
from ..engines import HEADLESS


def left_out(given: BaseModel, merged: BaseModel) -> Iterator[str]:
    """A warning for each engine that leaves the head out which the merge gives a model whose head
    was its embedding. `merged`: the base with the configuration of what is written."""
    family = given.config.get("model_type")
    engines = [name for name, families in HEADLESS.items() if family in families]
    if not engines or HEAD not in tied(given.config) or HEAD in tied(merged.config):
        return
    for engine in engines:
        yield (
            f"the run parts the head from the embedding, and {engine} has no head for models of "
            f"the type {family}: it computes with the embedding in its place, and says nothing; "
            "serve the merged model with an engine that has one"
        )
