"""Would an engine compute with a LoRA adapter what PEFT computes?

A check is a function from an adapter, as it lies on disk, to findings; each file of this package
holds those of one kind. The facts of the engines are in `converters/targets/engines.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..model.base import BaseModel
from ..targets.target import profiles
from . import features, fit, names, scales, tuners, values
from .finding import Check, Finding, open_adapter
from .heal import heal
from .loading import loading

CHECKS: tuple[Check, ...] = (
    *names.CHECKS,
    *scales.CHECKS,
    *fit.CHECKS,
    *features.CHECKS,
    *values.CHECKS,
    *tuners.CHECKS,
)
_ORDER = ("error", "warning", "info")


def lint(
    folder: Path, base: BaseModel | None = None, targets: Sequence[str] | None = None
) -> list[Finding]:
    """What is wrong with the adapter in `folder` for `targets` (all engines by default).

    Without `base` nothing is compared with it. Errors come first. Raises `DoraExportError` when
    there is no adapter, or its files are damaged.
    """
    adapter = open_adapter(folder, base, targets or tuple(profiles()))
    findings = [finding for check in CHECKS for finding in check(adapter)]
    told = {target for f in findings if f.severity == "error" for target in f.targets}
    rest = tuple(engine for engine in adapter.engines if engine.name not in told)
    findings += loading(replace(adapter, engines=rest))
    return sorted(findings, key=lambda finding: _ORDER.index(finding.severity))


__all__ = ["CHECKS", "Finding", "heal", "lint"]
