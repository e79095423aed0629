"""`dora-export extract TUNED OUT --base BASE`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import common


@click.command("extract")
@click.argument("tuned", metavar="TUNED")
@click.argument("out", type=common.FOLDER)
@click.option("--base", metavar="DIR_OR_ID", required=True, help="The model TUNED was made from.")
@common.fit_options
@common.force_option
@common.json_option
@common.reports_errors
def command(
    tuned: str, out: Path, base: str, limit: dict[str, Any], force: bool, as_json: bool
) -> None:
    """Write what the model TUNED changed of BASE as a LoRA adapter folder OUT.

    By default every module keeps 0.999 of its squared singular values (--energy 0.999). Tensors
    that changed and are no linear weights (norms, biases, embeddings, heads) are carried whole.
    """
    from converters.extract import ENERGY
    from dora_serve.api import extract

    result = extract(tuned, out, base=base, force=force, **(limit or {"energy": ENERGY}))
    assert result.fit is not None
    if as_json:
        common.print_json(
            {
                "output": str(out),
                "bytes": result.plan.nbytes,
                "ranks": result.fit.ranks,
                "whole": sorted(result.plan.whole),
                "fit": asdict(result.fit),
                "warnings": list(result.warnings),
            }
        )
    else:
        whole = ", ".join(sorted(result.plan.whole)) or "nothing"
        click.echo(f"{out}: LoRA adapter, {common.size(result.plan.nbytes)}; whole: {whole}")
        common.show_fit(result.fit)
    common.warn(result.warnings)
