"""`dora-export batch MANIFEST|DIR OUT`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from converters.errors import visible

from ..batch.manifest import forms
from ..progress import progress_bar
from ..wording import in_flags
from . import common
from .by_target import adapters


@click.command("batch")
@click.argument("source", type=common.FOLDER, metavar="MANIFEST|DIR")
@click.argument("out", type=common.FOLDER)
@common.base_option
@click.option(
    "--to",
    type=click.Choice(forms()),
    default="adapter",
    show_default=True,
    help="What to make of the runs that say nothing.",
)
@click.option(
    "--target",
    type=click.Choice(adapters()),
    default="peft",
    show_default=True,
    help="What the adapters are written for.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes; default: one for each core.")
@click.option("--ray", metavar="ADDRESS", help="Convert on this Ray cluster: HOST:PORT.")
@common.dry_run_option
@click.option("--force", is_flag=True, help="Convert what is done too; replace other outputs.")
@common.json_option
@common.reports_errors
def command(
    source: Path,
    out: Path,
    base: str | None,
    to: str,
    target: str,
    workers: int | None,
    ray: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Convert many runs: those of a manifest, or all that a folder holds.

    Each becomes OUT/NAME, whole or not at all, and OUT/batch.json says how each ended. The same
    command goes on where an earlier one was stopped: it leaves out what is done and unchanged.
    """
    from converters.files.cores import cores
    from dora_serve.batch import FILE, Engine, plan_batch, run_batch
    from dora_serve.batch.cluster import on_ray
    from dora_serve.batch.local import on_processes

    if ray is not None and workers is not None:
        raise click.UsageError("give one of --workers and --ray")
    batch = plan_batch(source, out, base=base, to=to, target=target, force=force)
    if dry_run:
        jobs = [
            {"name": j.name, "run": j.run, "base": j.base, "to": j.to, "done": j.done is not None}
            for j in batch.jobs
        ]
        if as_json:
            common.print_json({"output": str(out), "runs": jobs, "failed": dict(batch.problems)})
        else:
            for j in jobs:
                done = "  done" * bool(j["done"])
                click.echo(visible(f"{j['name']}  {j['to']} of {j['run']}{done}"))
            _show_failed(batch.problems)
        sys.exit(1 if batch.problems else 0)
    engine: Engine
    if ray is None:
        engine = partial(on_processes, workers=workers or len(cores()))
    else:
        engine = partial(on_ray, address=ray)
    with progress_bar(len(batch.jobs), "converting", unit="run") as advance:
        summary = run_batch(batch, engine, advance)
    if as_json:
        paths = {"output": str(out), "status": str(out / FILE)}
        common.print_json({**paths, **asdict(summary)})
    else:
        common.left_out({}, summary.warnings)
        _show_failed(summary.failed)
        click.echo(
            f"{visible(out)}: {summary.done} done ({summary.skipped} of them before), "
            f"{len(summary.failed)} failed, {summary.pending} left, {summary.seconds:.1f} s"
        )
    if summary.pending:
        click.secho("stopped; the same command goes on", fg="yellow", err=True)
        sys.exit(130)
    if summary.failed:
        sys.exit(1)


def _show_failed(failed: Mapping[str, str]) -> None:
    for name, error in failed.items():
        click.secho(in_flags(f"failed: {visible(name)}: {error}"), fg="red", err=True)
