"""The short form of `scripts/chaos_vllm.py`: no run answers for another, or with old weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

SCRIPT = Path(__file__).parents[3] / "scripts" / "chaos_vllm.py"


def test_a_name_answers_with_its_own_runs_present_weights() -> None:
    words = [sys.executable, SCRIPT, "--answers", "300", "--kills", "1", "--delay", "10"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    rows = dict(re.findall(r"^\| (.+) \| (\d+) \|$", done.stdout, re.M))
    assert int(rows["right"]) > 100
    assert rows["of another or of weights long gone"] == rows["nobody's"] == "0"
