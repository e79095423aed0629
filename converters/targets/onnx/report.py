"""What is told of an ONNX export: of what was written, and of what cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...certificate import certificate
from ...errors import TargetError
from ...model.base import BaseModel
from ...run import Run
from ..target import Report

MERGED = "export it merged: `onnx`"


@dataclass(frozen=True)
class OnnxReport(Report):
    """`ranks`: adapter → module → rank. `times`: milliseconds of a quantized decoder's step as
    `written` and in `float32`, which are of this machine and not of the artifact."""

    ranks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    times: Mapping[str, float] | None = None

    def summary(self) -> dict[str, object]:
        return {"step_milliseconds": self.times} if self.times else {}

    def lines(self) -> list[str]:
        if not self.times:
            return []
        return [
            f"one token on this machine: {self.times['written']} ms, "
            f"in float32 {self.times['float32']} ms"
        ]


def adapter_certificates(
    adapters: Mapping[str, Run], base: BaseModel, ranks: Mapping[str, Mapping[str, int]]
) -> dict[str, object]:
    return {
        name: certificate("onnx", run, base, {m: {"rank": r} for m, r in ranks[name].items()})
        for name, run in adapters.items()
    }


def refuse(run: Run, tensors: list[str]) -> None:
    """Raise an error when there are `tensors` that a graph has no input for."""
    if tensors:
        raise TargetError(
            "the run trained tensors that an adapter in an ONNX graph cannot carry",
            file=run.path,
            found=", ".join(tensors),
            remedy=MERGED,
        )
