"""Writing an adapter anew, so that an engine reads it right."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..errors import RunError
from ..files.output import save_tensors
from ..fit import prepare
from ..model.base import BaseModel
from ..readers import ReadOptions, read_run
from ..readers.run_folder import CONFIG_FILE
from ..targets.lora_folder import WEIGHTS
from ..targets.publish import Artifact, publish
from ..targets.target import targets
from .finding import PREFIX, Adapter, open_adapter


def heal(
    folder: Path, target: Path, engine: str, base: BaseModel | None = None, force: bool = False
) -> Artifact:
    """Read the adapter in `folder` under the names PEFT knows and write it for `engine`.

    Scales are folded in, zero modules left out (or put in, where the engine needs them), float64
    narrowed. Raises `DoraExportError` for what cannot be healed by writing it anew.
    """
    adapter = open_adapter(folder, base, (engine,))
    known = targets()
    writer = known.get(engine, known["peft"])  # what is no target of its own loads PEFT's
    options = ReadOptions(base=None if base is None else base.path)
    with tempfile.TemporaryDirectory() as name:
        source = _renamed(adapter, Path(name)) if _misnamed(adapter) else folder
        run = prepare(read_run(source, options), base)
        return publish(writer.plan(run, base, writer.options()), target, force=force)


def _misnamed(adapter: Adapter) -> bool:
    return any(f.named or not f.key.startswith(PREFIX) for f in adapter.factors)


def _renamed(adapter: Adapter, folder: Path) -> Path:
    shutil.copyfile(adapter.path / CONFIG_FILE, folder / CONFIG_FILE)
    names = {
        factor.key: f"{PREFIX}{factor.module}.lora_embedding_{factor.letter}"
        if factor.embedding
        else f"{PREFIX}{factor.module}.lora_{factor.letter}.weight"
        for factor in adapter.factors
    }
    if len(set(names.values())) < len(names):
        raise RunError(
            "several adapters in one file",
            file=adapter.path,
            found=", ".join(sorted({factor.key for factor in adapter.factors})[:4]),
            expected="one pair of factors for a module",
            remedy="save each adapter by itself",
        )
    tensors = {names.get(key, key): tensor.load() for key, tensor in adapter.tensors.items()}
    save_tensors(tensors, folder / WEIGHTS)
    return folder
