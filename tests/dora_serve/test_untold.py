"""What a command does when what it says cannot be written: the disk is full, or nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MODELS
from tests.processes import commands

RUN = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
FULL = Path("/dev/full")
EXPORT = "from dora_serve.commands import run_export; run_export()"
SERVE = "from dora_serve.commands import dora_serve; dora_serve()"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words",
    [
        (EXPORT, "--help"),
        (EXPORT, "inspect", str(RUN)),
        (EXPORT, "inspect", str(RUN), "--json"),
        (EXPORT, "inspect", "nothing", "--json"),
        (SERVE, "--version"),
        (SERVE, "plan", "--json", str(MODELS)),
    ],
)
def test_a_full_disk_is_one_line(words: tuple[str, ...]) -> None:
    python = sys.executable if words[1].startswith("--") else commands() / "python"
    with FULL.open("w") as full:
        done = subprocess.run(
            [python, "-c", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: printing failed: No space left on device"
    with FULL.open("w") as full:
        silent = subprocess.run([python, "-c", *words], stdout=full, stderr=full)
    assert silent.returncode == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("program", [EXPORT, SERVE])
def test_no_room_for_the_error_either(program: str, unbuffered: str) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "--help"],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=full,
        )
    assert done.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_takes_a_part_of_it(tmp_path: Path, unbuffered: str) -> None:
    bound = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
    with (tmp_path / "said").open("w") as said:
        done = subprocess.run(
            [sys.executable, "-c", bound + EXPORT, "--help"],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=said,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (tmp_path / "said").stat().st_size == 100
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: printing failed: File too large"]


@pytest.mark.parametrize("program", [EXPORT, SERVE])
def test_nobody_reads(program: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", program, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 1
    assert told == b""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("program", [EXPORT, SERVE])
def test_streams_that_are_closed(program: str, closed: str) -> None:
    """They are no error, and no file that is opened later gets their numbers."""
    later = "import atexit, os; atexit.register(lambda: os._exit(os.dup(os.open('/', 0)) < 3)); "
    for code in (program, later + program.replace("run_export", "dora_export")):
        line = f'exec "$0" -c "$1" --version {closed}'
        done = subprocess.run(["sh", "-c", line, sys.executable, code], capture_output=True)
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr
