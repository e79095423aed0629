"""Calls that only Linux has, renameat2 and prctl among them: without them (macOS) everything is
written the same."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from tests.conftest import MODELS
from tests.processes import commands

RUN = next(MODELS.glob("runs/*/*/*/Count_Down/*/checkpoint")).parent
_ELSEWHERE = """
import ctypes, os, sys
for name in ("sched_getaffinity", "sched_setaffinity", "copy_file_range"):
    delattr(os, name)
library = ctypes.CDLL
ctypes.CDLL = lambda name, **more: object() if name is None else library(name, **more)
from dora_serve.commands import run_export
run_export()
"""


def _export(command: list[str], *words: object) -> None:
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*.safetensors") if file.is_file())
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


def test_without_the_calls_of_linux(tmp_path: Path) -> None:
    """Merged, replaced by `--force`, and converted by two workers."""
    base = ("--base", MODELS / "tiny-llama-base")
    here = [str(commands() / "dora-export")]
    there = [str(commands() / "python"), "-c", _ELSEWHERE]
    for name, command in (("linux", here), ("elsewhere", there)):
        out = tmp_path / name
        out.mkdir()
        for force in ((), ("--force",)):
            _export(command, "merge", RUN, out / "merged", *base, *force)
        _export(command, "batch", MODELS, out / "batch", "--workers", "2")
    found = _digests(tmp_path / "elsewhere")
    assert len(found) >= 3
    assert found == _digests(tmp_path / "linux")
