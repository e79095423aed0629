"""Filling an ONNX folder as planned."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...certificate import sha256
from ...model.base import BaseModel, open_base
from ...run import Run
from ..merged.folder import write_folder
from ..merged.plan import plan_merge
from .adapters import write_adapters
from .decoder import build_decoder
from .encoder import build_adaptable_encoder, build_encoder
from .graph_file import GraphWriter
from .report import OnnxReport
from .seq2seq import build_seq2seq
from .tasks import ENCODER_TASKS, SEQ2SEQ_TASK

if TYPE_CHECKING:
    from .plan import OnnxPlan


_NOTHING = 5.0  # milliseconds, of a model too small to tell


def write_graphs(folder: Path, plan: OnnxPlan) -> OnnxReport:
    """Build what is planned in `folder`."""
    details: dict[str, object] = {"precision": plan.precision}
    if plan.calibrate is not None and plan.rows is not None:
        text = {"name": plan.calibrate.name, "tokens": plan.rows.size}
        details["calibration"] = {**text, "sha256": sha256(plan.calibrate)}
    decodes = plan.task not in ENCODER_TASKS and plan.task != SEQ2SEQ_TASK
    writer = GraphWriter(folder, plan.precision, decodes=decodes, rows=plan.rows)
    if plan.merges:
        merged = folder / ".merged"
        merged.mkdir()
        # float32, so that a quantized graph is rounded once from what was trained.
        write_folder(merged, plan_merge(plan.run, plan.base, torch.float32), lambda _bytes: None)
        _build(merged, folder, plan.task, writer)
        shutil.rmtree(merged)
        modules = {
            module: {
                "start_rank": plan.run.start_rank.get(module),
                "rank": plan.run.rank(module),
            }
            for module in plan.run.updates
        }
        return OnnxReport(modules, details, _slower(writer), times=writer.times)
    base, floats = plan.base, folder / ".floats"
    if base.stored is not None:  # a graph is made of floats
        floats.mkdir()
        none = plan_merge(Run(base.path, "none", {}), base, torch.float32)
        write_folder(floats, none, lambda _bytes: None)
        base = open_base(floats)
    _build_base(base, plan.adapters, folder, plan.task, writer)
    if base is plan.base:  # else it was read by its tensors, which tell
        base.check_unchanged()
    else:
        shutil.rmtree(floats)
    ranks = write_adapters(folder, plan.adapters, plan.base) if plan.adapters else {}
    return OnnxReport(details=details, warnings=_slower(writer), ranks=ranks, times=writer.times)


def _slower(writer: GraphWriter) -> tuple[str, ...]:
    """What to say of a graph that takes longer for a token than its float32 form does here."""
    times = writer.times or {"float32": 0.0, "written": 0.0}
    if times["written"] <= max(1.1 * times["float32"], _NOTHING):
        return ()
    return (
        f"a step of this {writer.precision} graph took {times['written']} ms on this machine, and "
        f"{times['float32']} ms in float32: it is smaller, not faster",
    )


def _build(model: Path, folder: Path, task: str, writer: GraphWriter) -> None:
    """The graphs of a Hugging Face folder, without adapters."""
    if task in ENCODER_TASKS:
        build_encoder(model, folder, task, writer)
    elif task == SEQ2SEQ_TASK:
        build_seq2seq(model, folder, writer, adaptable=False)
    else:
        build_decoder(model, folder, writer, adaptable=False)


def _build_base(
    base: BaseModel,
    adapters: Mapping[str, Run] | None,
    folder: Path,
    task: str,
    writer: GraphWriter,
) -> None:
    """The graphs of the base, able to carry adapters unless None are asked for; those of an encoder
    only where there are some, since they say what its head is."""
    if adapters is None or (not adapters and task in ENCODER_TASKS):
        _build(base.path, folder, task, writer)
    elif task in ENCODER_TASKS:
        build_adaptable_encoder(base, adapters, folder, task, writer)
    elif task == SEQ2SEQ_TASK:
        build_seq2seq(base.path, folder, writer, adaptable=True)
    else:
        build_decoder(base.path, folder, writer, adaptable=True)
