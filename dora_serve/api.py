"""The verbs of the Python API: runs and paths in, results out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from converters.compare import Comparison, compare
from converters.errors import MissingError, RunError
from converters.extract import ENERGY, difference
from converters.files.handles import there
from converters.fit import prepare
from converters.model.base import BaseModel, open_base
from converters.options import FitOptions, ReadOptions, chosen, names
from converters.readers import folder_of, is_run, read_run
from converters.run import Run
from converters.targets.publish import Artifact, Bar, publish
from converters.targets.target import target_named

from .folder.pairing import naming, told


def find_base(run: Run, base: str | Path | None) -> BaseModel:
    """The base the user names, else the hub model the run names.

    A local path inside a run is not followed: `MissingError` asks the user to name it.
    """
    if base is not None:
        return open_base(base)
    if run.base is None or Path(run.base).is_absolute() or run.base.startswith("."):
        raise MissingError(
            "the base model is not known",
            file=run.path,
            found=None if run.base is None else f"the run names {run.base}",
            remedy="pass it with `base`",
        )
    if there(Path(run.base)):
        raise MissingError(
            "the run names a local folder as its base, which is not followed by itself",
            file=run.path,
            found=run.base,
            remedy="pass its folder with `base`, where it is the right one",
        )
    return open_base(run.base, run.revision)


def export(
    run: Run | str | Path,
    output: str | Path,
    target: str,
    *,
    base: str | Path | BaseModel | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Bar | None = None,
    **options: Any,
) -> Artifact:
    """Write a run for any installed target: a folder that appears whole or not at all.

    `options`: those of the target, and one of `max_rank`, `energy` (share of the squared singular
    values to keep) and `budget` (parameters in all), which approximate the update. Without `base`
    an adapter's names and shapes are not checked. `dry_run` checks all and writes nothing. Raises
    `DoraExportError` with nothing written.
    """
    known = target_named(target)
    limit = {name: options.pop(name, None) for name in names(FitOptions)}
    chosen_options = chosen(known.options, options, target)
    if isinstance(base, BaseModel):
        model: BaseModel | None = base
        run = run if isinstance(run, Run) else read_run(run, ReadOptions(base=base.path))
    else:
        run = run if isinstance(run, Run) else read_run(run, ReadOptions(base=base))
        wanted = base is not None or known.kind == "model"
        model = find_base(run, base) if wanted else None
    if base is not None and model is not None:
        run = told(run, model)
    with naming(run, model) if model is not None else nullcontext():
        plan = known.plan(prepare(run, model, **limit), model, chosen_options)
    prove = None
    if target == "onnx" and model is not None:
        prove = partial(_accuracy, base=model, run=plan.run, adapters={})
    return publish(
        plan, output, force=force, resume=resume, dry_run=dry_run, progress=progress, prove=prove
    )


def merge(
    run: Run | str | Path,
    output: str | Path,
    *,
    base: str | Path | BaseModel | None = None,
    dtype: torch.dtype | str | None = None,
    requantize: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Bar | None = None,
) -> Artifact:
    """Merge a run into its base: a folder that `AutoModel*.from_pretrained` loads.

    `dtype` None keeps the base's. `requantize` writes what a base holds in float8 by blocks in such
    blocks again, and the report tells what that lost. `resume` continues a merge that was killed,
    and lets the next continue this one. Raises `DoraExportError` with nothing written.
    """
    more: dict[str, Any] = {"dtype": dtype, "requantize": requantize or None, "resume": resume}
    return export(run, output, "merged", base=base, force=force, progress=progress, **more)


def write_adapter(
    run: Run | str | Path,
    output: str | Path,
    *,
    base: str | Path | BaseModel | None = None,
    target: str = "peft",
    force: bool = False,
    **options: Any,
) -> Artifact:
    """Write a run as an adapter, another rank in every module, for one of the targets that take
    one; `options` as in `export`. Raises `DoraExportError` with nothing written."""
    return export(run, output, target, base=base, force=force, **options)


def write_onnx(
    base: str | Path | BaseModel,
    output: str | Path,
    *,
    run: Run | None = None,
    adapters: Mapping[str, Run] | None = None,
    precision: str = "fp32",
    calibrate: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Artifact:
    """Write `run` merged into `base`, or `base` with `adapters` (name → run), for ONNX Runtime.
    `{}` makes graphs of a decoder that adapters can be added to later.

    `precision` is fp32, fp16, int8 or int4; `calibrate`: a text to whose first 12,288 tokens the
    4 bits of a decoder are fitted, which loses less in fewer bytes. What torch exports is compared
    with the model, in float32, before it is written. For what the builder makes, the certificate
    records the error:
    run `verify`.
    Raises `DoraExportError` with nothing written.
    """
    from converters.targets import onnx

    model = base if isinstance(base, BaseModel) else open_base(base)
    return onnx.write_onnx(
        model,
        Path(output),
        run=run,
        adapters=adapters,
        precision=precision,
        calibrate=None if calibrate is None else Path(calibrate),
        force=force,
        dry_run=dry_run,
        prove=partial(_accuracy, base=model, run=run, adapters=adapters or {}),
    )


def _accuracy(
    folder: Path, base: BaseModel, run: Run | None, adapters: Mapping[str, Run]
) -> Mapping[str, object]:
    """What the certificate of an ONNX folder says of its logits."""
    from .proof.onnxruntime import prove

    return prove(folder, base, run, adapters)


def extract(
    tuned: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    target: str = "peft",
    force: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Artifact:
    """Write what the model `tuned` changed of `base` as an adapter; `options` as in `export`.

    Without `max_rank` or `budget`, every module keeps the share `energy` (by default 0.999) of its
    squared singular values. Tensors that changed and are no linear weights are carried whole.
    Raises `RunError` when no linear layer differs, `BaseError` for models of other shapes.
    """
    if all(options.get(name) is None for name in names(FitOptions)):
        options["energy"] = ENERGY
    model = open_base(base)
    run = tuned_run(tuned, model)
    return export(run, output, target, base=model, force=force, dry_run=dry_run, **options)


def tuned_run(tuned: str | Path, base: BaseModel) -> Run:
    """What the model `tuned` changed of `base`, as a run. Raises `RunError` when no linear layer
    differs."""
    run = difference(open_base(tuned), base)
    if not run.updates:
        raise RunError(
            "no linear layer differs between the two models",
            file=run.path,
            found=f"{len(run.replaced)} other tensors differ" if run.replaced else "equal weights",
            expected=f"a model tuned from {base.name}",
        )
    return run


def diff(
    left: Run | str | Path,
    right: Run | str | Path,
    *,
    base: str | Path | None = None,
    base_b: str | Path | None = None,
) -> Comparison:
    """How far apart the updates of two runs, adapters or models are, module by module.

    `base` is the base of both, `base_b` that of `right` where it is another. Models need one, or
    `MissingError` is raised.
    """
    model = None if base is None else open_base(base)
    other = model if base_b is None else open_base(base_b)
    return compare(_side(left, model), _side(right, other), model, other)


def _side(side: Run | str | Path, base: BaseModel | None) -> Run:
    if isinstance(side, Run):
        return side
    path = folder_of(side)
    if (path.is_dir() and is_run(path)) or not (path / "config.json").is_file():
        return read_run(side, ReadOptions(base=None if base is None else base.path)).strip()
    if base is None:
        raise MissingError(
            "a model is compared by what it changed of its base", file=path, remedy="pass `base`"
        )
    return difference(open_base(path), base)
