"""`dora-export lint ADAPTER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from converters.errors import visible
from converters.targets.target import profiles

from ..wording import in_flags
from . import common

if TYPE_CHECKING:
    from converters.lint import Finding

TARGETS = tuple(profiles())
_COLORS = {"error": "red", "warning": "yellow", "info": "cyan", "ok": "green"}
_SHOWN = 5


@click.command("lint")
@click.argument("adapter", type=common.SOURCE)
@common.base_option
@click.option(
    "--target",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    help="An engine it is for; default: all.",
)
@click.option("--fix", "out", type=common.OUTPUT, help="Write it anew, for the one --target.")
@common.force_option
@common.json_option
@common.reports_errors
def command(
    adapter: str,
    base: str | None,
    targets: tuple[str, ...],
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Tell whether engines compute with ADAPTER, any LoRA folder, what PEFT computes.

    Exit code 1 when there is an error (with --fix: when one is left). With --base, names, shapes
    and the fingerprint are checked against it.
    """
    from converters.errors import DoraExportError
    from converters.lint import heal, lint
    from converters.model.base import open_base
    from converters.readers import folder_of

    if out is not None and len(targets) > 1:
        raise click.UsageError("--fix writes for one --target")
    targets = targets or (TARGETS if out is None else ("peft",))
    model = None if base is None else open_base(base)
    folder = folder_of(adapter)
    findings = lint(folder, model, targets)
    left: list[Finding] | None = None
    why = None
    if out is not None:
        try:
            heal(folder, out, targets[0], model, force)
            left = lint(out, model, targets) if targets[0] != "gguf" else []
        except DoraExportError as error:
            why, left = in_flags(error), findings
    if as_json:
        common.print_json(_json(adapter, targets, findings, out, left, why))
    else:
        _print(adapter, targets, findings)
        if out is not None:
            _print_fix(out, targets, left or [], why)
    failed = any(
        finding.severity == "error" for finding in (findings if out is None else left or [])
    )
    sys.exit(1 if failed or why else 0)


def _verdict(findings: Sequence[Finding], target: str) -> str:
    found = {finding.severity for finding in findings if target in finding.targets}
    return next((severity for severity in ("error", "warning") if severity in found), "ok")


def _json(
    adapter: str,
    targets: Sequence[str],
    findings: Sequence[Finding],
    out: Path | None,
    left: Sequence[Finding] | None,
    why: str | None,
) -> dict[str, object]:
    result: dict[str, object] = {
        "adapter": adapter,
        "engines": {target: _verdict(findings, target) for target in targets},
        "findings": [asdict(finding) for finding in findings],
    }
    if out is not None:
        result["fix"] = {
            "output": str(out),
            "written": why is None,
            "not_healed": why,
            "left": [asdict(finding) for finding in left or []],
        }
    return result


def _print(adapter: str, targets: Sequence[str], findings: Sequence[Finding]) -> None:
    click.echo(visible(adapter))
    common_to_all = [finding for finding in findings if set(targets) <= set(finding.targets)]
    if len(targets) > 1 and common_to_all:
        _print_group("every engine", common_to_all)
    for target in targets:
        own = [
            finding
            for finding in findings
            if target in finding.targets and (len(targets) == 1 or finding not in common_to_all)
        ]
        _print_group(target, own, _verdict(findings, target))


def _print_group(title: str, findings: Sequence[Finding], verdict: str = "") -> None:
    click.echo(f"\n{title:<13}" + click.style(verdict, fg=_COLORS.get(verdict)))
    by_check: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        by_check.setdefault((finding.severity, finding.check, finding.what), []).append(finding)
    for (severity, check, what), group in by_check.items():
        mark = click.style(f"{severity:<8}", fg=_COLORS[severity])
        click.echo(f"  {mark} {check}: {visible(what)}")
        for finding in group[:_SHOWN]:
            where, found = visible(finding.where), visible(finding.found)
            click.echo(f"    {where}: {found}; expected {visible(finding.expected)}")
        if len(group) > _SHOWN:
            click.echo(f"    … and {len(group) - _SHOWN} more")
        click.echo(f"    fix: {in_flags(visible(group[0].fix))}")


def _print_fix(out: Path, targets: Sequence[str], left: Sequence[Finding], why: str | None) -> None:
    if why is not None:
        click.secho(f"\nnot healed, nothing written: {why}", fg="red")
        return
    remaining = [finding for finding in left if finding.severity != "info"]
    click.echo(f"\nwritten for {targets[0]}: {visible(out)}")
    if remaining:
        click.echo("what is left there:")
        _print_group(targets[0], remaining, _verdict(left, targets[0]))
