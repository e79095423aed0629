"""`dora-export inspect RUN`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.errors import visible
from converters.targets.target import Target, targets

from ..extras import without_extra
from ..wording import in_flags
from . import common

if TYPE_CHECKING:
    from converters.model.base import BaseModel
    from converters.run import Run


@click.command("inspect")
@common.run_argument
@common.base_option
@click.option("--png", type=common.FOLDER, help="Write the rank map as a PNG file.")
@click.option("--html", type=common.FOLDER, help="Write the rank map as one standalone HTML file.")
@click.option("--curve", is_flag=True, help="Show what an adapter of less size would lose.")
@click.option("--curve-png", type=common.FOLDER, help="Write that curve as a PNG file.")
@common.force_option
@common.json_option
@common.reports_errors
def command(
    run: Path,
    base: str | None,
    png: Path | None,
    html: Path | None,
    curve: bool,
    curve_png: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what RUN holds: method, finished or not, the rank map, sizes, accepted targets.

    With --base, tensors that training left as they were are not counted as trained whole.
    """
    from converters import fit
    from converters.model.base import open_base
    from dora_serve.rankmap.html import save_html
    from dora_serve.rankmap.output import check_apart, check_output_file
    from dora_serve.rankmap.picture import save_curve, save_png, terminal_map

    files = [file for file in (png, html, curve_png) if file is not None]
    if len({file.resolve() for file in files}) < len(files):
        raise click.UsageError("--png, --html and --curve-png take a file each")
    for file in files:
        check_output_file(file, force)
    loaded = common.load_run(run, base, **options)
    model = None if base is None else open_base(base)
    inputs = [*loaded.files, *loaded.inputs, *([] if model is None else [model.path])]
    for file in files:
        check_apart(file, inputs)
    info = _describe(loaded, model)
    largest = max([*loaded.start_rank.values(), *info["ranks"].values()], default=0)
    if png is not None:
        save_png(info["ranks"], largest, png, f"{loaded.path.parent.name}: ranks", force)
    facts = _facts(info)
    if html is not None:
        title = f"{loaded.path.parent.name}: ranks"
        save_html(_modules(loaded, info["ranks"]), facts, html, title, force)
    points = fit.curve(loaded.strip(), model) if curve or curve_png is not None else []
    if curve_png is not None:
        save_curve(points, curve_png, f"{loaded.path.parent.name}: size and error", force)
    if curve:
        info["curve"] = [asdict(point) for point in points]
    if as_json:
        common.print_json({**info, "written": [str(file) for file in files]})
        return
    for name, value in {**facts, **info["targets"]}.items():
        click.echo(f"{name:<11} {visible(value)}")
    click.echo()
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    click.echo(terminal_map(info["ranks"], largest, columns))
    if curve:
        click.echo()
        click.echo(f"{'--budget':>12} {'float32':>10} {'mean rank':>10} {'error':>9}")
        for point in points:
            size = common.size(4 * point.parameters)
            click.echo(
                f"{point.parameters:>12} {size:>10} {point.mean_rank:>10.2f} "
                f"{fit.percent(point.error):>9}"
            )
    for file in files:
        click.echo(f"{visible(file)}: written, {common.size(file.stat().st_size)}")
    common.warn(loaded.warnings)


def _facts(info: Mapping[str, Any]) -> dict[str, str]:
    parts, numbers = info["components"], info["parameters"]
    return {
        "method": f"{info['method']}, {'finished' if info['finished'] else 'NOT finished'}",
        "task": info["task"] or "unknown",
        "components": f"{parts['kept']} of {parts['start']} kept, mean rank "
        f"{info['mean_rank']:.2f}, ranks {info['min_rank']} to {info['max_rank']}",
        "parameters": f"{numbers['start']:,} trained, {numbers['kept']:,} kept",
        "whole": ", ".join(info["trained_whole"]) or "none",
    }


def _modules(run: Run, ranks: Mapping[str, int]) -> dict[str, dict[str, float | None]]:
    """What the rank map tells of every module; no update of a run is rounded yet."""
    told: dict[str, dict[str, float | None]] = {}
    updates = run.strip().updates
    for module, rank in ranks.items():
        components = updates[module].components()
        norm = None if components is None else components.norm()
        start = run.start_rank.get(module)
        told[module] = {"start": start, "rank": rank, "norm": norm, "relative": None, "lost": None}
    return told


def _describe(run: Run, base: Any) -> dict[str, Any]:
    from converters.model.match import changed

    stripped = run.strip()
    ranks: dict[str, int] = {}
    start = kept = 0
    for module, rank in stripped.ranks.items():
        # An update that is no sum of components cannot lose one.
        ranks[module] = run.start_rank.get(module, 0) if rank is None else rank
        start += run.start_rank.get(module, ranks[module]) * sum(run.shapes[module])
        kept += ranks[module] * sum(run.shapes[module])
    values = list(ranks.values())
    return {
        "path": str(run.path),
        "method": run.method,
        "finished": run.finished,
        "task": run.task or (None if base is None else base.task),
        "num_labels": run.num_labels,
        "base": run.base,
        "components": {"start": sum(run.start_rank.values()), "kept": sum(values)},
        "mean_rank": sum(values) / max(1, len(values)),
        "min_rank": min(values, default=0),
        "max_rank": max(values, default=0),
        "parameters": {"start": start, "kept": kept},
        "trained_whole": sorted(run.replaced if base is None else changed(run, base)),
        "targets": {n: _accepts(target, stripped, base) for n, target in targets().items()},
        "ranks": ranks,
        "warnings": list(run.warnings),
    }


def _accepts(target: Target, run: Run, base: BaseModel | None) -> str:
    """Whether `target` takes the stripped `run` with its own options, and how large it gets."""
    from converters.errors import DoraExportError

    if base is None and target.kind == "model":
        return "yes, if it fits the base (--base tells)"
    try:
        plan = target.plan(run, base, target.options())
    except (DoraExportError, ModuleNotFoundError) as error:
        said = without_extra(error) or error
        return "no: " + in_flags(said).replace("\n  ", "; ")
    return f"yes, {common.size(plan.nbytes)}"
