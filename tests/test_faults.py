"""The short form of `make faults`: commands that are stopped and disturbed lose nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/faults.py"


# `merge` meets every kind of fault, the others the few that are their own.
@pytest.mark.parametrize(
    "command",
    ["merge", *(pytest.param(n, marks=pytest.mark.further) for n in ("adapter", "cache"))],
)
def test_nothing_is_lost(command: str) -> None:
    words = ["--short", "--only", command]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {command} |" in done.stdout
    assert done.stdout.rstrip().endswith(" 0 lost")
