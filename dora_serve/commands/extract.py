"""`dora-export extract TUNED OUT --base BASE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converters.options import FitOptions

from ..progress import timed
from . import common
from .by_target import TargetCommand, adapters, target_option


@click.command("extract", cls=TargetCommand, target="peft")
@click.argument("tuned", metavar="TUNED", type=common.SOURCE)
@click.argument("out", type=common.OUTPUT)
@click.option(
    "--base",
    metavar="DIR_OR_ID",
    type=common.SOURCE,
    required=True,
    help="The model TUNED was made from.",
)
@common.takes(FitOptions)
@common.dry_run_option
@common.force_option
@common.json_option
@common.reports_errors
def command(
    tuned: str,
    out: Path,
    base: str,
    target: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write what the model TUNED changed of BASE as an adapter OUT.

    By default every module keeps 0.999 of its squared singular values (--energy 0.999). Tensors
    that changed and are no linear weights (norms, biases, embeddings, heads) are carried whole.
    """
    from converters.model.base import open_base
    from dora_serve.api import extract

    common.one_limit(options)
    with timed("extract", "finding what was changed", open_base(base).nbytes):
        artifact = extract(
            tuned, out, base=base, target=target, force=force, dry_run=dry_run, **options
        )
    common.show(artifact, as_json, report=False)


command.params.insert(3, target_option(adapters(), "peft"))
