"""`dora-export diff A B`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converters.errors import visible

from ..progress import timed
from . import common

if TYPE_CHECKING:
    from converters.compare import Difference


@click.command("diff")
@click.argument("a", type=common.SOURCE)
@click.argument("b", type=common.SOURCE)
@common.base_option
@click.option(
    "--base-b",
    metavar="DIR_OR_ID",
    type=common.SOURCE,
    help="The base of B, where it is another.",
)
@common.json_option
@common.reports_errors
def command(a: str, b: str, base: str | None, base_b: str | None, as_json: bool) -> None:
    """Compare the updates of A and B: runs, adapters, or models (with --base).

    Per module ‖ΔA − ΔB‖/‖ΔA‖ and the cosine of ΔA and ΔB; a run that needs options to be read is
    compared as the adapter made from it.
    """
    from converters.model.base import open_base
    from dora_serve.api import diff

    nbytes = 0 if base is None else open_base(base).nbytes
    with timed("diff", "comparing", nbytes):
        result = diff(a, b, base=base, base_b=base_b)
    if as_json:
        modules = {name: _numbers(module) for name, module in result.modules.items()}
        common.print_json(
            {"modules": modules, "whole": result.whole, "total": _numbers(result.total)}
        )
        return
    width = max(len(visible(name)) for name in (*result.modules, *result.whole, "all"))
    click.echo(f"{'':<{width}} {'relative':>9} {'cosine':>9}")
    for name, module in (*result.modules.items(), ("all", result.total)):
        name = visible(name)
        click.echo(f"{name:<{width}} {_text(module.relative):>9} {_text(module.cosine):>9}")
    for name, value in result.whole.items():
        shown = "only one has it, or of other shape" if value is None else f"{_text(value):>9}"
        click.echo(f"{visible(name):<{width}} {shown} (trained whole)")


def _numbers(difference: Difference) -> dict[str, Any]:
    return {
        "relative": difference.relative,
        "cosine": difference.cosine,
        "norm_a": difference.left**0.5,
        "norm_b": difference.right**0.5,
    }


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
