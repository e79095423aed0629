"""The short form of `make faults`: commands that are stopped and disturbed lose nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts/faults.py"


def test_nothing_is_lost() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| merge |" in done.stdout
    assert done.stdout.rstrip().endswith(" 0 lost")
