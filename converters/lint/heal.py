"""Writing an adapter anew, so that an engine reads it right."""

from __future__ import annotations

from pathlib import Path

from ..fit import prepare
from ..model.base import BaseModel
from ..readers import ReadOptions, read_stored
from ..targets.publish import Artifact, publish
from ..targets.target import targets


def heal(
    folder: Path, target: Path, engine: str, base: BaseModel | None = None, force: bool = False
) -> Artifact:
    """Read the adapter in `folder` under the names PEFT knows and write it for `engine`.

    Scales are folded in, zero modules left out (or put in, where the engine needs them), float64
    narrowed. Raises `DoraExportError` for what cannot be healed by writing it anew.
    """
    known = targets()
    writer = known.get(engine, known["peft"])  # what is no target of its own loads PEFT's
    options = ReadOptions(base=None if base is None else base.path)
    run = prepare(read_stored(folder, options), base)
    return publish(writer.plan(run, base, writer.options()), target, force=force)
