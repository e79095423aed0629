"""The one way from a plan to a folder: checked whole, made whole, certified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..certificate import write_certificate
from ..errors import OutputError
from ..files.output import check_output, output_folder
from ..progress import Progress
from .target import Plan, Report

Bar = Callable[[int], AbstractContextManager[Progress]]
Prove = Callable[[Path], Mapping[str, object]]


@dataclass(frozen=True)
class Artifact:
    """What was written, or is known to be writable: `written`. `accuracy`: what `prove` found."""

    path: Path
    plan: Any
    report: Any
    written: bool
    accuracy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.plan.warnings, *self.report.warnings)


def publish(
    plan: Plan,
    output: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Bar | None = None,
    prove: Prove | None = None,
) -> Artifact:
    """Write `plan` to the folder `output`, which appears whole or not at all.

    `force` replaces what is there. `resume` takes up what a killed call left, and leaves the like.
    `dry_run` checks all that is checked otherwise, and writes nothing. `progress` opens a bar for a
    number of bytes. `prove` is given the folder before it appears, and what it returns goes into
    the certificate. Raises `DoraExportError` with nothing written.
    """
    if not str(output):
        raise OutputError("the output's path is empty")
    output = Path(output)
    check_output(output, force, plan.inputs, plan.nbytes, resume)
    if dry_run:
        return Artifact(output, plan, Report(), written=False)
    bar = nullcontext(_unwatched) if progress is None else progress(plan.nbytes)
    with output_folder(output, resume) as folder, bar as advance:
        report = plan.write(folder, output.name, advance)
        proof = plan.certificate(report)
        accuracy = {} if prove is None else dict(prove(folder))
        if prove is not None:
            proof["accuracy"] = accuracy
        write_certificate(folder, proof, plan.pieces)
    return Artifact(output, plan, report, written=True, accuracy=accuracy)


def _unwatched(_bytes: int) -> None:
    """Nobody is watching."""
