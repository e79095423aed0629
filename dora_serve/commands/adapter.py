"""`dora-export adapter RUN OUT`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import common


@click.command("adapter")
@common.run_argument
@click.argument("out", type=common.OUTPUT)
@common.base_option
@common.target_option
@click.option(
    "--dtype",
    type=click.Choice(common.DTYPES),
    default="float32",
    show_default=True,
    help="Dtype of the stored factors.",
)
@common.fit_options
@common.dry_run_option
@common.force_option
@common.json_option
@common.reports_errors
def command(
    run: Path,
    out: Path,
    base: str | None,
    target: str,
    dtype: str,
    limit: dict[str, Any],
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Repack RUN as a LoRA adapter folder OUT with another rank in every module.

    With --base, names, shapes and frozen weights are checked against it. Without one of
    --max-rank, --energy and --budget the adapter is the whole update, exactly.
    """
    from converters.files.output import check_output
    from converters.model.base import open_base
    from converters.targets.engines import PROFILES
    from converters.targets.lora_folder.adapter import plan_adapter, prepare, write_adapter

    loaded = common.load_run(run, base, **options)
    model = None if base is None else open_base(base)
    stored = common.torch_dtype(dtype)
    assert stored is not None
    if dry_run:
        fitted, fit = prepare(loaded, model, **limit)
        plan = plan_adapter(fitted, model, PROFILES[target], stored)
        check_output(out, force, [loaded.path], plan.nbytes)
        warnings, errors = loaded.warnings, {}
        if fit is not None and fit.warning is not None:
            warnings = (*warnings, fit.warning)
    else:
        result = write_adapter(
            loaded, out, base=model, profile=target, dtype=stored, force=force, **limit
        )
        plan, warnings, errors, fit = result.plan, result.warnings, result.errors, result.fit
    ranks = {module: rank for module, (_, rank) in plan.ranks.items()}
    if as_json:
        common.print_json(
            {
                "output": str(out),
                "written": not dry_run,
                "bytes": plan.nbytes,
                "target": target,
                "ranks": ranks,
                "max_rank": max(ranks.values(), default=0),
                "modules_to_save": plan.config["modules_to_save"],
                "errors": errors,
                "fit": None if fit is None else asdict(fit),
                "warnings": list(warnings),
            }
        )
    else:
        alive = sum(rank > 0 for rank in ranks.values())
        click.echo(
            f"{'would write ' if dry_run else ''}{out}: LoRA adapter for {target}, "
            f"{alive} of {len(ranks)} modules, ranks up to {max(ranks.values(), default=0)}, "
            f"{common.size(plan.nbytes)}"
        )
        if errors:
            click.echo(f"  largest relative error of storing: {max(errors.values()):.1e}")
        if fit is not None:
            common.show_fit(fit)
    common.warn(warnings)
