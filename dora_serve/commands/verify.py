"""`dora-export verify RUN ARTIFACT`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from converters.targets.target import targets

from . import common


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

    Exit code 0 when they agree, 1 when not. The negative control leaves the update out: it must
    fail, or the comparison would prove nothing.
    """
    from converters.run import NO_UPDATE
    from dora_serve.api import find_base
    from dora_serve.proof.verify import verify

    loaded = common.load_run(run, base, **options)
    result = verify(loaded, artifact, find_base(loaded, base), engine)
    if as_json:
        common.print_json({**asdict(result), "passed": result.passed})
    else:
        click.echo(f"engine              {result.engine} ({result.dtype})")
        click.echo(f"max abs difference  {result.max_abs:.2e}   (at most {result.tolerance:.0e})")
        click.echo(f"top-1 agreement     {result.top1:.2%}")
        control = "fails, as it must" if result.control_fails else "does not fail"
        click.echo(f"update left out     {result.control:.2e}   ({control})")
        if result.fit is not None:
            limit = ", ".join(f"{name} {value}" for name, value in result.fit.items())
            click.echo(f"fitted              {limit}: the truth above is the live run so fitted")
            click.echo(
                f"to the whole run    {result.unfitted:.2e}   (what the fit changed; no bound)"
            )
        verdict = "PASSED" if result.passed else "FAILED"
        click.secho(verdict, fg="green" if result.passed else "red", bold=True)
    common.warn((*loaded.warnings, *(() if result.has_update else (NO_UPDATE,))))
    sys.exit(0 if result.passed else 1)
