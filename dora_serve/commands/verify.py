"""`dora-export verify RUN ARTIFACT`."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.errors import visible
from converters.targets.target import targets

from ..progress import timed
from . import common

if TYPE_CHECKING:
    from converters.model.base import BaseModel
    from converters.run import Run
    from dora_serve.proof.verify import Verification


@click.command("verify")
@common.run_argument
@click.argument("artifact", type=common.INPUT)
@common.base_option
@click.option(
    "--engine",
    type=click.Choice(sorted({name for t in targets().values() for name in t.engines})),
    help="Engine that loads the artifact; default: the one that fits.",
)
@common.json_option
@common.reports_errors
def command(
    run: Path,
    artifact: Path,
    base: str | None,
    engine: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare ARTIFACT with the live, unmerged model of RUN: numbers and a verdict.

    Exit code 0 when they agree, 1 when not, or when ARTIFACT does not load. The negative control
    leaves the update out: it must fail, or the comparison would prove nothing.
    """
    from dora_serve.api import find_base
    from dora_serve.proof.verify import verify

    loaded = common.load_run(run, base, **options)
    model = find_base(loaded, base)
    with timed("verify", "comparing with the live run", model.nbytes):
        result = verify(loaded, artifact, model, engine)
    if as_json:
        numbers = {**asdict(result), "passed": result.passed}
        common.print_json({k: None if v != v or v == math.inf else v for k, v in numbers.items()})
    else:
        if result.truth:
            _print_numbers(result, loaded, model)
        for reason in result.failures:
            told = (f"\n{'':20}").join(visible(line) for line in reason.split("\n"))
            click.echo(f"fault               {told}")
        verdict = "PASSED" if result.passed else "FAILED"
        click.secho(verdict, fg="green" if result.passed else "red", bold=True)
    common.warn((*loaded.warnings, *result.warnings))
    sys.exit(0 if result.passed else 1)


def _print_numbers(result: Verification, run: Run, base: BaseModel) -> None:
    told = {"peft": "PEFT's own model", "live": "the base with the updates beside its layers"}
    if run.method.startswith("peft_") and " + " not in run.method and result.fit is None:
        told["live"] += "; PEFT loads no such model of this folder, so nothing else proves how "
        told["live"] += "it was read"
    lines = {
        "engine": f"{result.engine} ({result.dtype})",
        "truth": f"{result.truth}: {told[result.truth]}",
        "base": common.base_said(run, base),
        "prompts": "; ".join((*result.asked, *result.left)),
        "max abs difference": f"{result.max_abs:.2e}   (at most {result.tolerance:.1e})",
        "float32 noise": f"{result.noise:.2e}   (of the truth, against {result.noise_of})",
        "top-1 agreement": f"{result.top1:.2%}",
    }
    control = "fails, as it must" if result.control_fails else "does not fail"
    lines["update left out"] = f"{result.control:.2e}   ({control})"
    if result.rounding is not None:
        lines["rounding"] = (
            f"{result.rounding:.2e}   (what {result.dtype} weights changed of the logits, the "
            f"truth's too; of a module's update at most {result.lost:.2%}; float32 has none)"
        )
    if result.dequantized is not None:
        lines["quantized base"] = f"made floats by {result.dequantized}"
    if result.fit is not None:
        limit = ", ".join(f"{name} {value}" for name, value in result.fit.items())
        lines["fitted"] = f"{limit}: the truth above is the live run so fitted"
        lines["to the whole run"] = f"{result.unfitted:.2e}   (what the fit changed; no bound)"
    for name, text in lines.items():
        click.echo(f"{name:<20}{visible(text)}")
