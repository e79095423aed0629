"""What an ONNX export is about to write, checked before anything is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...certificate import FILE, fingerprint_of_base, tool
from ...errors import TargetError
from ...files.handles import tells_case_apart
from ...files.onnx_files import BATCHED, DECODER, ENCODER, FOLDER, MODEL, PRECISIONS, WITH_PAST
from ...files.tensors import nbytes, numel, read_json
from ...model.architecture import check_size, known_model
from ...model.base import BaseModel
from ...model.match import (
    changed,
    check_frozen,
    check_names,
    kernels_of,
    resolved,
    target_architecture,
)
from ...model.tasks import architecture_of
from ...progress import Progress
from ...run import Run
from ..merged.plan import plan_merge
from ..merged.types import dropped_types
from ..target import Plan, Report
from .report import MERGED, OnnxReport, adapter_certificates, refuse
from .tasks import ENCODER_TASKS, SEQ2SEQ_TASK, heads_of

_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 0.5}  # of a weight, at least
_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class OnnxPlan(Plan):
    """`graphs`: their files; an encoder's batched one is left out where it cannot be.

    `adapters`: name → stripped run; None for graphs without branches. `merges`: whether `run` goes
    into the weights; else it is one of the adapters, or None. `calibrate`: the text that 4 bits are
    fitted to, `rows` its tokens.
    """

    run: Run
    base: BaseModel
    task: str
    graphs: tuple[str, ...]
    adapters: Mapping[str, Run] | None
    precision: str
    merges: bool
    calibrate: Path | None = None
    rows: NDArray[np.int64] | None = None

    @property
    def inputs(self) -> list[Path]:
        runs = [self.run] if self.merges else list((self.adapters or {}).values())
        texts = [] if self.calibrate is None else [self.calibrate]
        return [self.base.path, *texts, *(path for run in runs for path in (run.path, *run.inputs))]

    def summary(self) -> dict[str, Any]:
        adapters = (self.adapters or {}).items()
        return {
            "precision": self.precision,
            "graphs": list(self.graphs),
            "adapters": {n: {m: run.rank(m) or 0 for m in run.updates} for n, run in adapters},
        }

    def lines(self) -> list[str]:
        ranks = self.summary()["adapters"].items()
        return [
            f"{', '.join(self.graphs)}, {self.precision}",
            *(f"adapter {n}: ranks up to {max(own.values(), default=0)}" for n, own in ranks),
        ]

    def write(self, folder: Path, name: str, progress: Progress) -> OnnxReport:  # noqa: ARG002
        from .write import write_graphs

        report = write_graphs(folder, self)
        progress(self.nbytes)
        return report

    def certificate(self, report: Report) -> dict[str, object]:
        if self.merges:
            return super().certificate(report)
        assert isinstance(report, OnnxReport)
        base = self.base
        return {
            "tool": tool(),
            "target": self.target,
            "base": {"name": base.name, "fingerprint": base.fingerprint},
            **report.details,
            "adapters": adapter_certificates(self.adapters or {}, base, report.ranks),
        }


def plan_onnx(
    base: BaseModel,
    *,
    run: Run | None = None,
    adapters: Mapping[str, Run] | None = None,
    precision: str = "fp32",
    calibrate: Path | None = None,
) -> OnnxPlan:
    """What `write_onnx` writes. Raises `DoraExportError` for what graphs cannot carry, and
    `ModuleNotFoundError` where what builds them is not installed."""
    import onnx  # noqa: F401

    stripped = (
        None
        if adapters is None
        else {n: resolved(each.kept().strip(), base) for n, each in adapters.items()}
    )
    merged = None if run is None else run.kept().strip()
    runs = [merged] if merged is not None else list((stripped or {}).values())
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
    _check_adapters(stripped or {}, base, task)
    if calibrate is not None and (precision != "int4" or task != "causal-lm"):
        raise TargetError(
            "nothing is fitted to a text here",
            file=calibrate,
            found=f"{task} in {precision}",
            expected="a decoder in int4",
            remedy="leave out `calibrate`",
        )
    said = [told for each in runs for told in (*each.warnings, *dropped_types(each, base))]
    if merged is not None:
        said += plan_merge(merged, base, torch.float32).warnings
    carries = merged is None and (
        bool(stripped) or (stripped is not None and task not in ENCODER_TASKS)
    )
    graphs: tuple[str, ...] = (MODEL, BATCHED) if carries else (MODEL,)
    if task == SEQ2SEQ_TASK:
        graphs = (ENCODER, DECODER, WITH_PAST)
    if architecture := architecture_of(base.config):
        check_size(architecture, base.config, sum(map(nbytes, base.tensors.values())))
    elements = sum(numel(tensor) for tensor in base.tensors.values())
    return OnnxPlan(
        target="onnx",
        run=merged or next(iter((stripped or {}).values()), Run(base.path, "none", {})),
        base=base,
        nbytes=int(elements * _BYTES[precision]),
        warnings=tuple(dict.fromkeys(said)),
        task=task,
        graphs=graphs,
        adapters=stripped,
        precision=precision,
        merges=merged is not None,
        calibrate=calibrate,
        rows=None if calibrate is None else _rows(calibrate, base),
    )


def _rows(text: Path, base: BaseModel) -> NDArray[np.int64]:
    from .fitted import rows_of

    return rows_of(text, base)


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
    own = {name.casefold(): name for name in known}
    for name in sorted(adapters.keys() - known.keys()):
        other = own.get(name.casefold())
        if other is not None and not tells_case_apart(folder / FOLDER):
            raise TargetError(
                "this disk does not tell the adapter's name from another's",
                file=folder,
                found=f"{other} and {name}",
                remedy="choose another name",
            )
    _check_adapters(adapters, base, _task(base, list(adapters.values())))
    _check_base(proof, base, folder)
    return {name: resolved(run.strip(), base) for name, run in adapters.items()}


def _task(base: BaseModel, runs: list[Run]) -> str | None:
    """The task of the runs, or the base's own."""
    tasks = {run.task for run in runs if run.task is not None}
    if len(tasks) > 1:
        raise TargetError("the runs are for different tasks", found=", ".join(sorted(tasks)))
    return tasks.pop() if tasks else base.task


def _check_adapters(adapters: Mapping[str, Run], base: BaseModel, task: str | None) -> None:
    """Raise an error for an adapter that is of another base, or that a graph cannot carry."""
    for name, run in adapters.items():
        if not _NAME.fullmatch(name):
            raise TargetError(
                "not a name for an adapter",
                found=name,
                expected="letters, digits, - _ .",
                remedy="give it another: NAME=RUN on the command line",
            )
        check_frozen(run, base)
        architecture, _ = target_architecture(run, base)
        whole = changed(run, base).keys() - _own_heads(run, base, architecture, task)
        biases = [name for name in run.updates if name.endswith(".bias")]
        refuse(run, [*sorted(whole), *sorted(run.embeddings), *biases, *kernels_of(run, base)])
        for module, rank in run.strip().ranks.items():
            if rank is None:
                raise TargetError(
                    "this module's update is not low-rank",
                    file=run.path,
                    tensor=module,
                    remedy=MERGED,
                )
            if module.endswith("]"):  # a block of a parameter
                raise TargetError(
                    "an ONNX graph has no branch for experts",
                    file=run.path,
                    tensor=module,
                    remedy=MERGED,
                )
        check_names(run, base)


def _own_heads(run: Run, base: BaseModel, architecture: str | None, task: str | None) -> set[str]:
    """The tensors that the graph has inputs for, as an adapter may bring them."""
    if task not in ENCODER_TASKS:
        return set()
    cls = architecture or architecture_of(base.config)
    heads = heads_of(known_model(cls, base.config, run.num_labels), task)
    return {f"{module}.{part}" for module in heads for part in ("weight", "bias")}


def _check_base(proof: Mapping[str, object], base: BaseModel, folder: Path) -> None:
    if other := base.unlike(fingerprint_of_base(proof) or {}):
        raise TargetError(
            "the graph was made from another base",
            file=folder / FILE,
            tensor=other[0],
            remedy="pass the base that it was made from with `base`",
        )
