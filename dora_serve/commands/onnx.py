"""`dora-export onnx [RUN] OUT`."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from converters.errors import visible
from converters.options import ReadOptions
from converters.targets.onnx import OnnxOptions

from ..folder.names import own_name
from ..progress import timed
from . import common

if TYPE_CHECKING:
    from converters.run import Run

_NAMED = re.compile(r"([\w][\w.-]*)=(.+)")


@click.command("onnx")
@common.takes(ReadOptions)
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
@common.takes(OnnxOptions)
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
    calibrate: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export ONNX graphs for ONNX Runtime into the folder OUT.

    With --dry-run the runs and the base are checked, and no graph is built.

    \b
    dora-export onnx RUN OUT                          RUN merged into its base
    dora-export onnx --base BASE OUT --adapter RUN …  BASE, every RUN beside it
    dora-export onnx --add OUT --base BASE --adapter RUN
    """
    from converters.targets.onnx import add_adapters
    from dora_serve.api import find_base, write_onnx
    from dora_serve.remote.local import needs_local

    if len(paths) != (1 if adapter_runs or add else 2):
        raise click.UsageError("give RUN and OUT, or OUT with --adapter RUN")
    out = paths[-1]
    if add:
        _add_alone(adapter_runs)
        needs_local(out, "--add")
    adapters = _by_name(adapter_runs, base, options)
    run = None if adapters else common.load_run(paths[0], base, **options)
    model = find_base(run or next(iter(adapters.values())), base)
    if add:
        ranks = add_adapters(out, adapters, model, force=force, dry_run=dry_run)
        warnings = tuple(w for each in adapters.values() for w in each.warnings)
        said = {"output": str(out), "written": not dry_run, "adapters": ranks}
        if as_json:
            common.print_json({**said, "warnings": list(warnings)})
        for name, modules in ({} if as_json else ranks).items():
            would = "would be added" if dry_run else "added"
            largest = max(modules.values(), default=0)
            click.echo(f"{visible(out)}: adapter {visible(name)} {would}, ranks up to {largest}")
        common.warn(warnings)
        return
    doing = "building the graph and comparing it with the live run"
    with nullcontext() if dry_run else timed(f"onnx-{precision}", doing, model.nbytes):
        artifact = write_onnx(
            model,
            out,
            run=run,
            adapters=adapters or None,
            precision=precision,
            calibrate=calibrate,
            force=force,
            dry_run=dry_run,
        )
    proved = (
        f"{name}: logits within {numbers['max_abs']:.1e} of the live run, "
        f"top-1 {numbers['top1']:.1%}"
        for name, numbers in artifact.accuracy.items()
    )
    common.show(artifact, as_json, *proved)
    if artifact.accuracy:
        from dora_serve.proof.onnxruntime import beyond

        common.warn(
            tuple(
                f"{name}: further from the live run here than `verify` allows; run that, on more "
                "prompts, or take a wider `precision`"
                for name in beyond(precision, artifact.accuracy)
            )
        )


def _add_alone(adapter_runs: tuple[str, ...]) -> None:
    """`--add` puts adapters beside a graph that is there: it needs some, and what only a graph that
    is made anew can heed would be ignored."""
    if not adapter_runs:
        raise click.UsageError("--add needs --adapter RUN")
    context = click.get_current_context()
    for name in ("precision", "calibrate"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} is for a new graph: --add leaves it as it is")


def _by_name(texts: tuple[str, ...], base: str | None, options: dict[str, Any]) -> dict[str, Run]:
    """The runs by their names, of which none may be another's: trainers call many folders alike."""
    adapters: dict[str, Run] = {}
    for text in texts:
        name, run = _named(text, base, options)
        if name in adapters:
            first = adapters[name].path
            raise click.UsageError(
                f"two adapters would be called {visible(name)}: {visible(first)} and "
                f"{visible(run.path)}; name them with --adapter NAME=RUN"
            )
        adapters[name] = run
    return adapters


def _named(text: str, base: str | None, options: dict[str, Any]) -> tuple[str, Run]:
    """`NAME=RUN`, or RUN under the name of its folder, or of its repository at the hub."""
    match = None if Path(text).exists() else _NAMED.fullmatch(text)
    path = Path(match[2] if match else text)
    run = common.load_run(path, base, **options)
    folder = run.path.parent if run.path.name == "checkpoint" else run.path
    return match[1] if match else own_name(folder).rpartition("/")[2], run
