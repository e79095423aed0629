"""`dora-export extract TUNED OUT --base BASE`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from converters.fit import FitReport
    from converters.targets.lora_folder.adapter import AdapterPlan


@click.command("extract")
@click.argument("tuned", metavar="TUNED", type=common.SOURCE)
@click.argument("out", type=common.OUTPUT)
@click.option(
    "--base",
    metavar="DIR_OR_ID",
    type=common.SOURCE,
    required=True,
    help="The model TUNED was made from.",
)
@common.target_option
@common.fit_options
@common.dry_run_option
@common.force_option
@common.json_option
@common.reports_errors
def command(
    tuned: str,
    out: Path,
    base: str,
    target: str,
    limit: dict[str, Any],
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write what the model TUNED changed of BASE as a LoRA adapter folder OUT.

    By default every module keeps 0.999 of its squared singular values (--energy 0.999). Tensors
    that changed and are no linear weights (norms, biases, embeddings, heads) are carried whole.
    """
    from converters.extract import ENERGY
    from dora_serve.api import extract

    limit = limit or {"energy": ENERGY}
    if dry_run:
        plan, fit, warnings = _plan(tuned, out, base, target, limit, force)
    else:
        result = extract(tuned, out, base=base, target=target, force=force, **limit)
        plan, fit, warnings = result.plan, result.fit, result.warnings
    assert fit is not None
    if as_json:
        common.print_json(
            {
                "output": str(out),
                "written": not dry_run,
                "bytes": plan.nbytes,
                "target": target,
                "ranks": fit.ranks,
                "whole": sorted(plan.whole),
                "fit": asdict(fit),
                "warnings": list(warnings),
            }
        )
    else:
        whole = ", ".join(sorted(plan.whole)) or "nothing"
        would = "would write " if dry_run else ""
        click.echo(
            f"{would}{out}: LoRA adapter for {target}, {common.size(plan.nbytes)}; whole: {whole}"
        )
        common.show_fit(fit)
    common.warn(warnings)


def _plan(
    tuned: str, out: Path, base: str, target: str, limit: dict[str, Any], force: bool
) -> tuple[AdapterPlan, FitReport | None, tuple[str, ...]]:
    import torch

    from converters.files.output import check_output
    from converters.model.base import open_base
    from converters.targets.engines import PROFILES
    from converters.targets.lora_folder.adapter import plan_adapter, prepare
    from dora_serve.api import tuned_run

    model = open_base(base)
    run = tuned_run(tuned, model)
    fitted, fit = prepare(run, model, **limit)
    plan = plan_adapter(fitted, model, PROFILES[target], torch.float32)
    check_output(out, force, [run.path, model.path], plan.nbytes)
    more = () if fit is None or fit.warning is None else (fit.warning,)
    return plan, fit, (*run.warnings, *more)
