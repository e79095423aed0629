"""ONNX graphs for ONNX Runtime: a merged model, or the base with many adapters beside it.

With adapters the folder holds two graphs over the same weights: `model.onnx` runs with one adapter
at a time (`onnxruntime.LoraAdapter`, `onnxruntime_genai.Adapters`), `batched.onnx` with another
adapter in every row of a batch. Without an adapter both are the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import TargetError
from ...files.onnx_files import PRECISIONS, is_onnx_folder
from ...options import option
from ..target import Target

if TYPE_CHECKING:
    from ...model.base import BaseModel
    from ...run import Run
    from ..publish import Artifact, Prove
    from .plan import OnnxPlan


@dataclass(frozen=True)
class OnnxOptions:
    """How the graph stores its weights."""

    precision: str = option(
        "fp32", "Of the base's weights; adapters stay float32.", choices=PRECISIONS
    )
    calibrate: Path | None = option(
        None, "int4 of a decoder: text whose first 12,288 tokens the weights are fitted to."
    )


class Onnx(Target):
    """A run merged into its base, as graphs. Adapters beside a base are planned by `plan_onnx`."""

    name = "onnx"
    kind = "model"
    options = OnnxOptions
    engines = ("onnxruntime",)

    def plan(self, run: Run, base: BaseModel | None, options: OnnxOptions) -> OnnxPlan:
        from .plan import plan_onnx

        if base is None:
            raise TargetError("a graph is made of its base", file=run.path, remedy="pass `base`")
        return plan_onnx(base, run=run, precision=options.precision, calibrate=options.calibrate)

    def holds(self, folder: Path) -> bool:
        return is_onnx_folder(folder)


def write_onnx(
    base: BaseModel,
    output: Path,
    *,
    run: Run | None = None,
    adapters: Mapping[str, Run] | None = None,
    precision: str = "fp32",
    calibrate: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    prove: Prove | None = None,
) -> Artifact:
    """Write `run` merged into `base`, or `base` with `adapters` (name → run), as ONNX. No adapters,
    `{}`, makes graphs of a decoder that some can be added to later; None makes plain ones.

    Raises `DoraExportError`, with nothing written, when the graph cannot carry the runs.
    """
    from ..publish import publish
    from .plan import plan_onnx

    plan = plan_onnx(base, run=run, adapters=adapters, precision=precision, calibrate=calibrate)
    return publish(plan, output, force=force, dry_run=dry_run, prove=prove)


def add_adapters(
    folder: Path,
    adapters: Mapping[str, Run],
    base: BaseModel,
    *,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, dict[str, int]]:
    """Add adapters to a folder that was written with some; the graphs stay as they are. Returns
    their ranks. `dry_run` checks and adds nothing.

    Each file appears whole. Raises `TargetError` for another base, a name that is taken (without
    `force`), or a folder that carries no adapters.
    """
    from . import add

    return add.add_adapters(folder, adapters, base, force, dry_run)
