"""The verbs of the Python API: runs and paths in, results out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.compare import Comparison, compare
from converters.errors import MissingError, RunError
from converters.extract import ENERGY, difference
from converters.files.handles import there
from converters.model.base import BaseModel, open_base
from converters.readers import ReadOptions, is_run, read_run
from converters.run import Run
from converters.targets.lora_folder import adapter
from converters.targets.lora_folder.adapter import AdapterResult
from converters.targets.merged import folder as merged
from converters.targets.merged.folder import MergeResult
from converters.targets.merged.stream import Progress

from .folder.pairing import told

if TYPE_CHECKING:
    from converters.targets.onnx import OnnxResult


def find_base(run: Run, base: str | Path | None) -> BaseModel:
    """The base the user names, else the hub model the run names.

    A local path inside a run is not followed: `MissingError` asks the user to name it.
    """
    if base is not None:
        return open_base(base)
    if run.base is None or Path(run.base).is_absolute() or run.base.startswith("."):
        named = "" if run.base is None else f" (the run names {run.base})"
        raise MissingError(
            "the base model is not known",
            file=run.path,
            remedy=f"pass --base FOLDER_OR_HUB_ID{named}",
        )
    if there(Path(run.base)):
        raise MissingError(
            "the run names a local folder as its base, which is not followed by itself",
            file=run.path,
            found=run.base,
            remedy=f"pass --base {run.base}",
        )
    return open_base(run.base)


def merge(
    run: Run | str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[int], AbstractContextManager[Progress]] | None = None,
) -> MergeResult:
    """Merge a run into its base: a folder that `AutoModel*.from_pretrained` loads.

    `dtype` None keeps the base's. `resume` continues a merge that was killed, and lets the next
    continue this one. Raises `DoraExportError` with nothing written.
    """
    run = run if isinstance(run, Run) else read_run(run, ReadOptions(base=base))
    model = find_base(run, base)
    return merged.write_merged(
        run if base is None else told(run, model),
        model,
        Path(output),
        dtype=dtype,
        force=force,
        resume=resume,
        progress=progress,
    )


def write_adapter(
    run: Run | str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    target: str = "peft",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    max_rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> AdapterResult:
    """Write a run as a LoRA adapter folder with another rank in every module.

    Without `base`, names and shapes are not checked against it. One of `max_rank`, `energy` (share
    of the squared singular values to keep) and `budget` (parameters in all) approximates the
    update; the result's `fit` says the error. Raises `DoraExportError` with nothing written.
    """
    run = run if isinstance(run, Run) else read_run(run, ReadOptions(base=base))
    model = None if base is None else open_base(base)
    return adapter.write_adapter(
        run if model is None else told(run, model),
        Path(output),
        base=model,
        profile=target,
        dtype=dtype,
        force=force,
        max_rank=max_rank,
        energy=energy,
        budget=budget,
    )


def write_onnx(
    base: str | Path | BaseModel,
    output: str | Path,
    *,
    run: Run | None = None,
    adapters: Mapping[str, Run] | None = None,
    precision: str = "fp32",
    force: bool = False,
) -> OnnxResult:
    """Write `run` merged into `base`, or `base` with `adapters` (name → run), for ONNX Runtime.
    `{}` makes graphs of a decoder that adapters can be added to later.

    `precision` is fp32, fp16, int8 or int4. What torch exports is compared with the model, in
    float32, before it is written. For what the builder makes, the certificate records the error:
    run `verify`.
    Raises `DoraExportError` with nothing written.
    """
    from converters.targets import onnx

    from .proof.onnxruntime import prove

    model = base if isinstance(base, BaseModel) else open_base(base)
    beside = dict(adapters or {})
    return onnx.write_onnx(
        model,
        Path(output),
        run=run,
        adapters=None if adapters is None else beside,
        precision=precision,
        force=force,
        prove=lambda folder: prove(folder, model, run, beside),
    )


def extract(
    tuned: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    energy: float | None = None,
    max_rank: int | None = None,
    budget: int | None = None,
    target: str = "peft",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> AdapterResult:
    """Write what the model `tuned` changed of `base` as a LoRA adapter folder.

    Without `max_rank` or `budget`, every module keeps the share `energy` (by default 0.999) of its
    squared singular values. Tensors that changed and are no linear weights are carried whole.
    """
    if max_rank is None and budget is None and energy is None:
        energy = ENERGY
    model = open_base(base)
    return adapter.write_adapter(
        tuned_run(tuned, model),
        Path(output),
        base=model,
        profile=target,
        dtype=dtype,
        force=force,
        max_rank=max_rank,
        energy=energy,
        budget=budget,
    )


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

    `base` is the base of both, `base_b` that of `right` where it is another. Models need one.
    """
    model = None if base is None else open_base(base)
    other = model if base_b is None else open_base(base_b)
    return compare(_side(left, model), _side(right, other), model, other)


def _side(side: Run | str | Path, base: BaseModel | None) -> Run:
    if isinstance(side, Run):
        return side
    path = Path(side)
    if (path.is_dir() and is_run(path)) or not (path / "config.json").is_file():
        return read_run(side, ReadOptions(base=None if base is None else base.path)).strip()
    if base is None:
        raise MissingError(
            "a model is compared by what it changed of its base", file=path, remedy="pass --base"
        )
    return difference(open_base(path), base)
