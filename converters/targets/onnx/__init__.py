"""ONNX graphs for ONNX Runtime: a merged model, or the base with many adapters beside it.

With adapters the folder holds two graphs over the same weights: `model.onnx` runs with one adapter
at a time (`onnxruntime.LoraAdapter`, `onnxruntime_genai.Adapters`), `batched.onnx` with another
adapter in every row of a batch. Without an adapter both are the base.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...certificate import FILE, certificate, file_record, tool, write_certificate, write_json
from ...files.onnx_files import FOLDER, SUFFIX, graphs_in, heads_in
from ...files.output import addition, output_folder
from ...files.tensors import read_json
from ...model.base import BaseModel
from ...model.match import changed
from ...run import LazyUpdates, Run
from ..merged.folder import write_merged
from .adapters import write_adapter_file
from .branches import input_shapes, sites_in
from .decoder import build_decoder
from .encoder import ENCODER_TASKS, build_adaptable_encoder, build_encoder
from .heads import head_tensors
from .plan import plan_added, plan_onnx, refuse
from .seq2seq import SEQ2SEQ_TASK, build_seq2seq

Prove = Callable[[Path], Mapping[str, object]]


@dataclass(frozen=True)
class OnnxResult:
    """What was written. `ranks`: adapter → module → rank."""

    path: Path
    precision: str
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    accuracy: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def write_onnx(
    base: BaseModel,
    target: Path,
    *,
    run: Run | None = None,
    adapters: Mapping[str, Run] | None = None,
    precision: str = "fp32",
    force: bool = False,
    prove: Prove | None = None,
) -> OnnxResult:
    """Write `run` merged into `base`, or `base` with `adapters` (name → run), as ONNX. No adapters,
    `{}`, makes graphs of a decoder that some can be added to later; None makes plain ones.

    `prove` is given the folder before it appears, and what it returns goes into the certificate.
    Raises `DoraExportError`, with nothing written, when the graph cannot carry the runs.
    """
    plan = plan_onnx(base, target, run=run, adapters=adapters, precision=precision, force=force)
    runs = dict(adapters or {})
    ranks: dict[str, dict[str, int]] = {}
    accuracy: Mapping[str, object] = {}
    with output_folder(target) as folder:
        if run is None:
            _build_base(base, plan.adapters, folder, plan.task, precision)
        else:
            merged = folder / ".merged"
            # float32, so that a quantized graph is rounded once from what was trained.
            write_merged(run, base, merged, dtype=torch.float32)
            _build(merged, folder, plan.task, precision)
            shutil.rmtree(merged)
        if plan.adapters:
            ranks = _write_adapters(folder, plan.adapters, base)
        if prove is not None:
            accuracy = prove(folder)
        details = {"precision": precision, "accuracy": dict(accuracy)}
        write_certificate(folder, _certificate(run, runs, base, ranks, details))
    return OnnxResult(target, precision, ranks, accuracy, plan.warnings)


def _build(model: Path, folder: Path, task: str, precision: str) -> None:
    """The graphs of a Hugging Face folder, without adapters."""
    if task in ENCODER_TASKS:
        build_encoder(model, folder, task, precision)
    elif task == SEQ2SEQ_TASK:
        build_seq2seq(model, folder, precision, adaptable=False)
    else:
        build_decoder(model, folder, precision, adaptable=False)


def _build_base(
    base: BaseModel, adapters: Mapping[str, Run] | None, folder: Path, task: str, precision: str
) -> None:
    """The graphs of the base, able to carry adapters unless None are asked for; those of an encoder
    only where there are some, since they say what its head is."""
    if adapters is None or (not adapters and task in ENCODER_TASKS):
        _build(base.path, folder, task, precision)
    elif task in ENCODER_TASKS:
        build_adaptable_encoder(base, adapters, folder, task, precision)
    elif task == SEQ2SEQ_TASK:
        build_seq2seq(base.path, folder, precision, adaptable=True)
    else:
        build_decoder(base.path, folder, precision, adaptable=True)


def _write_adapters(
    folder: Path, adapters: Mapping[str, Run], base: BaseModel
) -> dict[str, dict[str, int]]:
    shapes: dict[str, list[int | str]] = {}
    for file in graphs_in(folder):
        shapes |= input_shapes(file)
    sites = sites_in(shapes)
    (folder / FOLDER).mkdir(exist_ok=True)
    ranks = {}
    for name, run in adapters.items():
        heads = heads_in(shapes)
        own = {f"{module}.{part}" for module in heads for part in ("weight", "bias")}
        refuse(run, sorted(changed(run, base).keys() - own))
        updates = {m: partial(run.updates.__getitem__, m) for m in run.updates if m not in heads}
        ranks[name] = write_adapter_file(
            folder / FOLDER / f"{name}{SUFFIX}",
            replace(run, updates=LazyUpdates(updates)),
            sites,
            head_tensors(run, base, shapes),
        )
    return ranks


def _certificate(
    run: Run | None,
    adapters: Mapping[str, Run],
    base: BaseModel,
    ranks: Mapping[str, Mapping[str, int]],
    details: Mapping[str, Any],
) -> dict[str, object]:
    if run is not None:
        stripped = run.strip()
        modules = {
            module: {"start_rank": run.start_rank.get(module), "rank": stripped.rank(module)}
            for module in run.updates
        }
        return certificate("onnx", run, base, modules, **details)
    return {
        "tool": tool(),
        "kind": "onnx",
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        **details,
        "adapters": _adapter_certificates(adapters, base, ranks),
    }


def _adapter_certificates(
    adapters: Mapping[str, Run], base: BaseModel, ranks: Mapping[str, Mapping[str, int]]
) -> dict[str, object]:
    return {
        name: certificate(
            "onnx adapter", run, base, {m: {"rank": rank} for m, rank in ranks[name].items()}
        )
        for name, run in adapters.items()
    }


def add_adapters(
    folder: Path, adapters: Mapping[str, Run], base: BaseModel, *, force: bool = False
) -> dict[str, dict[str, int]]:
    """Add adapters to a folder that was written with some; the graphs stay as they are.

    Each file appears whole. Raises `TargetError` for another base, a name that is taken (without
    `force`), or a folder that carries no adapters.
    """
    with addition(folder) as temporary:
        stripped = plan_added(folder, adapters, base, force=force)
        proof: dict[str, Any] = read_json(folder / FILE)
        for file in graphs_in(folder):
            shutil.copyfile(file, temporary / file.name)
        ranks = _write_adapters(temporary, stripped, base)
        proof["adapters"] |= _adapter_certificates(adapters, base, ranks)
        for name in adapters:  # what was measured was measured on the run of that name before
            proof.get("accuracy", {}).pop(name, None)
        added = [Path(FOLDER, f"{name}{SUFFIX}") for name in adapters]
        records = {file.as_posix(): file_record(temporary / file) for file in added}
        proof["files"] = {**proof.get("files", {}), **records}
        write_json(temporary / FILE, proof)
        (folder / FOLDER).mkdir(exist_ok=True)
        for file in (*added, Path(FILE)):
            (temporary / file).replace(folder / file)
    return ranks
