"""`dora-export onnx [RUN] OUT`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from converters.model.base import BaseModel
    from converters.run import Run

_NAMED = re.compile(r"([\w][\w.-]*)=(.+)")


@click.command("onnx")
@common.run_options
@click.argument(
    "paths",
    metavar="[RUN] OUT",
    type=common.INPUT,
    nargs=-1,
    required=True,
    callback=common.last_is_output,
)
@common.base_option
@click.option(
    "--adapter",
    "adapter_runs",
    metavar="[NAME=]RUN",
    type=common.SOURCE,
    multiple=True,
    help="A run to put beside the base as an adapter; may be given again.",
)
@click.option("--add", is_flag=True, help="Add the adapters to OUT, which was written with some.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="fp32",
    show_default=True,
    help="Of the base's weights; adapters stay float32.",
)
@common.dry_run_option
@common.force_option
@common.json_option
@common.reports_errors
def command(
    paths: tuple[Path, ...],
    base: str | None,
    adapter_runs: tuple[str, ...],
    add: bool,
    precision: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export ONNX graphs for ONNX Runtime into the folder OUT.

    With --dry-run the runs and the base are checked, and no graph is built.

    \b
    dora-export onnx RUN OUT                          RUN merged into its base
    dora-export onnx --base BASE OUT --adapter RUN …  BASE, and every RUN as an adapter beside it
    dora-export onnx --add OUT --base BASE --adapter RUN
    """
    from converters.targets.onnx import add_adapters
    from dora_serve.api import find_base, write_onnx
    from dora_serve.remote.local import needs_local

    if len(paths) != (1 if adapter_runs else 2):
        raise click.UsageError("give RUN and OUT, or OUT with --adapter RUN")
    out = paths[-1]
    if add:
        needs_local(out, "--add")
    adapters = dict(_named(text, base, options) for text in adapter_runs)
    run = None if adapters else common.load_run(paths[0], base, **options)
    model = find_base(run or next(iter(adapters.values())), base)
    if dry_run:
        _show_plan(out, model, run, adapters, precision, add=add, force=force, as_json=as_json)
        return
    if sys.stderr.isatty():
        click.echo("building the graph and comparing it with the live run …", err=True)
    if add:
        ranks = add_adapters(out, adapters, model, force=force)
        accuracy: Any = {}
        warnings = tuple(w for each in adapters.values() for w in each.warnings)
    else:
        result = write_onnx(
            model, out, run=run, adapters=adapters, precision=precision, force=force
        )
        ranks, accuracy, warnings = result.ranks, result.accuracy, result.warnings
    if as_json:
        info = {"output": str(out), "written": True, "adapters": ranks, "warnings": list(warnings)}
        made = {} if add else {"precision": precision, "accuracy": accuracy}
        common.print_json({**info, **made})
    else:
        size = common.size(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))
        done = "adapters added" if add else f"ONNX graph, {precision}"
        click.echo(f"{out}: {done}, {size}")
        for name, numbers in (accuracy or {}).items():
            click.echo(
                f"  {name}: logits within {numbers['max_abs']:.1e} of the live run, "
                f"top-1 {numbers['top1']:.1%}"
            )
        for name, modules in ranks.items():
            click.echo(f"  adapter {name}: ranks up to {max(modules.values(), default=0)}")
    common.warn(warnings)


def _show_plan(
    out: Path,
    base: BaseModel,
    run: Run | None,
    adapters: dict[str, Run],
    precision: str,
    *,
    add: bool,
    force: bool,
    as_json: bool,
) -> None:
    from converters.targets.onnx.plan import plan_added, plan_onnx

    graphs: tuple[str, ...] = ()
    if add:
        stripped = plan_added(out, adapters, base, force=force)
    else:
        plan = plan_onnx(base, out, run=run, adapters=adapters, precision=precision, force=force)
        graphs, stripped = plan.graphs, plan.adapters or {}
    ranks = {n: {m: each.rank(m) or 0 for m in each.updates} for n, each in stripped.items()}
    warnings = tuple(w for each in (run, *adapters.values()) if each for w in each.warnings)
    if as_json:
        info = {"output": str(out), "written": False, "graphs": graphs, "adapters": ranks}
        common.print_json({**info, "warnings": list(warnings)})
    else:
        if graphs:
            click.echo(f"would write {out}: {', '.join(graphs)}, {precision}")
        for name, modules in ranks.items():
            verb = "would add to" if add else "would write"
            click.echo(
                f"{verb} {out}: adapter {name}, ranks up to {max(modules.values(), default=0)}"
            )
    common.warn(warnings)


def _named(text: str, base: str | None, options: dict[str, Any]) -> tuple[str, Run]:
    """`NAME=RUN`, or RUN under the name of its folder."""
    match = None if Path(text).exists() else _NAMED.fullmatch(text)
    path = Path(match[2] if match else text)
    run = common.load_run(path, base, **options)
    folder = run.path.parent if run.path.name == "checkpoint" else run.path
    return match[1] if match else folder.name, run
