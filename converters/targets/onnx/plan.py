"""What an ONNX export is about to write, checked before anything is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...certificate import FILE
from ...errors import TargetError
from ...files.onnx_files import BATCHED, DECODER, ENCODER, MODEL, WITH_PAST
from ...files.output import check_output
from ...files.tensors import read_json
from ...model.base import BaseModel
from ...model.match import changed, check_frozen, target_architecture
from ...model.tasks import task_of
from ...run import Run
from ..merged.plan import plan_merge
from .encoder import ENCODER_TASKS
from .seq2seq import SEQ2SEQ_TASK
from .write import PRECISIONS

_MERGED = "export it merged: `onnx`"
_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class OnnxPlan:
    """`graphs`: their files; an encoder's batched one is left out where it cannot be.

    `adapters`: name → stripped run; None for graphs without branches.
    """

    task: str
    graphs: tuple[str, ...]
    adapters: dict[str, Run] | None
    warnings: tuple[str, ...]


def plan_onnx(
    base: BaseModel,
    target: Path,
    *,
    run: Run | None,
    adapters: Mapping[str, Run] | None,
    precision: str,
    force: bool,
) -> OnnxPlan:
    """What `write_onnx` writes. Raises `DoraExportError` when it may not, or cannot."""
    runs = [*([run] if run is not None else []), *(adapters or {}).values()]
    check_output(target, force, [base.path, *(each.path for each in runs)])
    if precision not in PRECISIONS:
        raise TargetError("unknown precision", found=precision, expected=", ".join(PRECISIONS))
    task = _task(base, runs)
    if task is None or task not in {"causal-lm", SEQ2SEQ_TASK, *ENCODER_TASKS}:
        raise TargetError("no ONNX export for this task", found=task)
    if "text_config" in base.config:
        raise TargetError(
            "no ONNX export for models of more than text",
            file=base.path,
            found=base.config.get("architectures"),
            remedy="deploy the merged model (`merge`)",
        )
    _check_adapters(adapters or {}, base, heads=task in ENCODER_TASKS)
    stripped = None if adapters is None else {n: each.strip() for n, each in adapters.items()}
    if run is not None:
        plan_merge(run.strip(), base, torch.float32)
    free = stripped is not None and task not in ENCODER_TASKS
    carries = run is None and (bool(stripped) or free)
    graphs: tuple[str, ...] = (MODEL, BATCHED) if carries else (MODEL,)
    if task == SEQ2SEQ_TASK:
        graphs = (ENCODER, DECODER, WITH_PAST)
    return OnnxPlan(task, graphs, stripped, tuple(w for each in runs for w in each.warnings))


def plan_added(
    folder: Path, adapters: Mapping[str, Run], base: BaseModel, *, force: bool
) -> dict[str, Run]:
    """The stripped runs that `add_adapters` puts into `folder`, by name. Raises `TargetError` when
    it cannot."""
    proof = read_json(folder / FILE)
    known = proof.get("adapters")
    if not isinstance(known, dict):
        raise TargetError(
            "this folder carries no adapters",
            file=folder,
            remedy="write it with adapters beside the base (`onnx`)",
        )
    taken = sorted(adapters.keys() & known.keys())
    if taken and not force:
        raise TargetError(
            "an adapter of this name is there already",
            file=folder,
            found=", ".join(taken),
            remedy="choose another name, or pass `force` to replace it",
        )
    _check_adapters(adapters, base, heads=_task(base, list(adapters.values())) in ENCODER_TASKS)
    _check_base(proof, base, folder)
    return {name: run.strip() for name, run in adapters.items()}


def _task(base: BaseModel, runs: list[Run]) -> str | None:
    """The task of the runs, or the one that the base's own architecture is for."""
    tasks = {run.task for run in runs if run.task is not None}
    if len(tasks) > 1:
        raise TargetError("the runs are for different tasks", found=", ".join(sorted(tasks)))
    return tasks.pop() if tasks else task_of(base.config)


def _check_adapters(adapters: Mapping[str, Run], base: BaseModel, *, heads: bool) -> None:
    """Raise an error for an adapter that is of another base, or that a graph cannot carry.

    `heads`: whether the graph has inputs for heads trained whole, which are then checked later.
    """
    for name, run in adapters.items():
        if not _NAME.fullmatch(name):
            raise TargetError("not a name for an adapter", found=name, expected="letters, - _ .")
        check_frozen(run, base)
        target_architecture(run, base)
        whole = [] if heads else sorted(changed(run, base))
        refuse(run, [*whole, *sorted(run.embeddings)])
        for module, rank in run.strip().ranks.items():
            if rank is None:
                raise TargetError(
                    "this module's update is not low-rank",
                    file=run.path,
                    tensor=module,
                    remedy=_MERGED,
                )
            if module.endswith("]"):  # a block of a parameter
                raise TargetError(
                    "an ONNX graph has no branch for experts",
                    file=run.path,
                    tensor=module,
                    remedy=_MERGED,
                )
            base.is_transposed(module, run.shapes[module])


def refuse(run: Run, tensors: list[str]) -> None:
    """Raise an error when there are `tensors` that a graph has no input for."""
    if tensors:
        raise TargetError(
            "the run trained tensors that an adapter in an ONNX graph cannot carry",
            file=run.path,
            found=", ".join(tensors),
            remedy=_MERGED,
        )


def _check_base(proof: Mapping[str, object], base: BaseModel, folder: Path) -> None:
    of_graph = proof.get("base")
    known = of_graph.get("fingerprint") if isinstance(of_graph, dict) else None
    other = base.unlike(known if isinstance(known, dict) else {})
    if other:
        raise TargetError(
            "the graph was made from another base",
            file=folder / FILE,
            tensor=other[0],
            remedy="pass the base that it was made from with `base`",
        )
