"""How exact an ONNX folder is: its logits in ONNX Runtime against the live runs.

A float32 graph must equal the live run within `verify`'s bound on every logit, a float16 one within
5 % of the update's own effect. A quantized graph passes when its error is less than half of that
effect and nine in ten of its choices are the live run's: its base is another one, and only told
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.certificate import FILE as CERTIFICATE
from converters.certificate import sha256
from converters.errors import MissingError, RunError, TargetError
from converters.files.json_files import read_json
from converters.model.base import BaseModel
from converters.run import Run
from converters.targets.model import Inputs, Model, Reading, equal_choices, logits

from ..onnxruntime.model import open_onnx
from .live import truth_of
from .prompts import verification_batch

_SHARES = {"fp16": 0.05, "int8": 0.5, "int4": 0.5}
_TOP1 = {"int8": 0.9, "int4": 0.9}


def open_folder(folder: Path, _base: BaseModel, run: Run) -> Model:
    """An ONNX folder: merged, or with `run` as one of its adapters, which is found by its files'
    hashes and its options, and tried alone and beside the others in a batch, under every name that
    it has there."""
    if not (folder / CERTIFICATE).exists():
        raise MissingError(
            "this ONNX folder has no certificate, so what it should compute is not known",
            file=folder / CERTIFICATE,
            remedy="make it with `onnx`",
        )
    certificate = read_json(folder / CERTIFICATE)
    precision = str(certificate.get("precision"))
    names, others = _names(run, folder, certificate)
    model = open_onnx(folder)

    def read(batches: Sequence[Inputs]) -> Reading:
        found = []
        for name in names:
            model.adapters = name
            found += [logits(model, inputs) for inputs in batches]
            found += [_mixed(model, inputs, name, others) for inputs in batches if others]
        parts = [found[i : i + len(batches)] for i in range(0, len(found), len(batches))]

        def measure(live: Any) -> list[torch.Tensor]:
            return [logits(live, inputs) for inputs in batches] * len(parts)

        def top1(_live: Any, truth: Sequence[torch.Tensor]) -> Callable[[float], float]:
            return lambda within: min(
                equal_choices(part, truth[: len(batches)], within) for part in parts
            )

        return Reading(found, measure, top1)

    return Model(read, precision, share=_SHARES.get(precision, 0.0), top1=_TOP1.get(precision, 1.0))


def _names(
    run: Run, path: Path, certificate: Mapping[str, Any]
) -> tuple[Sequence[str | None], list[str | None]]:
    """The names of the run among the folder's adapters, and what it may lie beside in a batch."""
    adapters = certificate.get("adapters")
    if not isinstance(adapters, dict):
        return [None], []
    wanted = {sha256(file) for file in run.files}
    made = {name: proof["run"] for name, proof in adapters.items()}
    names = [n for n, one in made.items() if {file["sha256"] for file in one["files"]} == wanted]
    # One file may be several adapters, as DyLoRA's, whose rank is chosen when it is read.
    names = [n for n in names if made[n].get("options") == dict(run.options)] or names
    if not names:
        raise RunError(
            "the run is not among the folder's adapters",
            file=path,
            found=", ".join(adapters),
            remedy="add it (`onnx` with `add`)",
        )
    return names, [None, *(other for other in adapters if other not in names)]


def _mixed(model: Any, inputs: Inputs, name: str | None, others: list[str | None]) -> torch.Tensor:
    """The run's logits of every row, each taken from a batch whose other rows are others'."""
    count = len(next(iter(inputs.values())))
    batches = []
    for row in range(count):
        model.adapters = [others[i % len(others)] for i in range(count)]
        model.adapters[row] = name
        batches.append(logits(model, inputs))
    axis = 0 if batches[0].shape[0] == count else 1  # answers come as [start and end, rows, length]
    return torch.stack([batch.select(axis, row) for row, batch in enumerate(batches)], dim=axis)


def prove(
    folder: Path, base: BaseModel, run: Run | None, adapters: Mapping[str, Run]
) -> dict[str, dict[str, float]]:
    """Per run (`merged`, or the adapter's name): `max_abs` of the logits' difference to the live
    run, `top1` agreement, and `control`, the live run's difference to the base.

    Raises `TargetError` for a graph whose logits are not finite where the live run's are.
    """
    runs: dict[str, Run] = {"merged": run} if run is not None else dict(adapters)
    found = {}
    model = open_onnx(folder)
    for name, each in runs.items():
        live = truth_of(each, base)
        inputs = verification_batch(live.model)
        truth = logits(live.model, inputs)
        live.detach()
        model.adapters = None if run is not None else name
        deployed = logits(model, inputs)
        if truth.isfinite().all() and not deployed.isfinite().all():
            raise TargetError(
                "the graph's numbers grow beyond what its precision holds",
                file=base.path,
                found="logits that are not finite",
                expected="finite ones, as the live run has",
                remedy="choose another precision: in float16 numbers end at 65,504",
            )
        found[name] = {
            "max_abs": float((deployed - truth).abs().max()),
            "top1": equal_choices([deployed], [truth]),
            "control": float((logits(live.model, inputs) - truth).abs().max()),
        }
    return found


def beyond(precision: str, accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Of what `prove` found of a graph in less than float32 the runs that are further from the live
    ones than `verify`, on more prompts, allows."""
    share, top1 = _SHARES.get(precision), _TOP1.get(precision, 1.0)
    return [
        name
        for name, numbers in accuracy.items()
        if share is not None
        and (numbers["max_abs"] > share * numbers["control"] or numbers["top1"] < top1)
    ]
