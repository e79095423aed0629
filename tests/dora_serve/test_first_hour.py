"""What a newcomer meets: colours, silence, completion, exit codes, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dora_serve import merge
from dora_serve.commands import dora_export, dora_serve
from tests.conftest import MODELS
from tests.processes import commands

RUN = next(MODELS.glob("runs/*/*/*/Count_Down/*/checkpoint")).parent
BASE = MODELS / "tiny-llama-base"
RED = "\x1b[31m"


def export(*words: object, **variables: str) -> Result:
    return CliRunner(env=variables).invoke(dora_export, [str(word) for word in words])


def test_colours_follow_the_variables(tmp_path: Path) -> None:
    code = "from dora_serve.commands import run_export; run_export()"
    words = [str(commands() / "python"), "-c", code, "inspect", str(tmp_path)]
    for variables, coloured in (
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"FORCE_COLOR": "", "NO_COLOR": ""}, False),
    ):
        done = subprocess.run(
            words, env={**os.environ, **variables}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert (RED in done.stderr) == coloured, variables


def test_quiet_says_nothing_but_json_and_errors(tmp_path: Path) -> None:
    for flag in ("--quiet", "-q"):
        done = export("merge", RUN, tmp_path / flag, "--base", BASE, flag)
        assert done.exit_code == 0 and done.stdout == ""
        assert (tmp_path / flag / "config.json").is_file()
    loud = export("merge", RUN, tmp_path / "loud", "--base", BASE)
    assert "merged 28 modules" in loud.stdout
    told = export("check", tmp_path / "loud", "--quiet", "--json")
    assert json.loads(told.stdout)["passed"]
    refused = export("check", tmp_path / "nowhere", "--quiet")
    assert refused.exit_code == 1 and "no such path" in refused.stderr


def test_verbose_shows_where_and_how_long(tmp_path: Path) -> None:
    refused = export("check", tmp_path / "nowhere", "--verbose")
    assert "Traceback" in refused.stderr and "check.py" in refused.stderr
    assert "Traceback" not in export("check", tmp_path / "nowhere").stderr
    assert export("check", tmp_path, "--verbose", "--quiet").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = export(_DORA_EXPORT_COMPLETE=f"{shell}_source")
    assert script.exit_code == 0 and "_DORA_EXPORT_COMPLETE" in script.output
    words = {"COMP_WORDS": "dora-export ver", "COMP_CWORD": "1" if shell != "fish" else "ver"}
    found = export(_DORA_EXPORT_COMPLETE=f"{shell}_complete", **words)
    assert "verify" in found.output and "inspect" not in found.output


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    """While the command waits for a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "key")
    code = "from dora_serve.commands import run_export; run_export()"
    words = ["-c", code, "check", str(tmp_path), "--public-key", str(tmp_path / "key")]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with (tmp_path / "key").open("w"):  # opens once the command reads it
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (130, "", "stopped by Ctrl-C\n")


@pytest.mark.further
def test_ctrl_c_while_graphs_are_made(tmp_path: Path) -> None:
    """As a terminal sends it: to the process that makes them too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = "from dora_serve.commands import dora_serve; dora_serve()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "up", str(MODELS), "--port", port],
        env={**os.environ, "DORA_SERVE_CACHE": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None and "tiny" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert said.splitlines()[-1] == "stopped by Ctrl-C" and "Traceback" not in said


@pytest.mark.parametrize("engine", ["onnxruntime", "vllm"])
def test_the_port_is_tried_before_any_work(engine: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["up", str(tmp_path / "nowhere"), "--engine", engine, "--port"]
        refused = CliRunner().invoke(dora_serve, [*words, port])
    assert refused.exit_code == 1
    assert f"nothing can listen on port {port}" in refused.stderr and "--port" in refused.stderr
    free = CliRunner().invoke(dora_serve, [*words, port])
    assert free.exit_code == 1 and "can listen" not in free.stderr


@pytest.mark.parametrize(("addresses", "free"), [(["::2", "127.0.0.1"], True), (["::2"], False)])
def test_an_address_that_the_machine_has_not(
    addresses: list[str], free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `localhost` has two, of which one is nowhere where IPv6 is off."""
    kinds = [(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in addresses]
    found = [(kind, socket.SOCK_STREAM, 6, "", (each, 0)) for kind, each in kinds]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_more: found)
    done = CliRunner().invoke(dora_serve, ["up", str(tmp_path / "nowhere")])
    assert done.exit_code == 1 and ("can listen" not in done.stderr) == free


def test_a_folder_that_is_no_run_is_told_what_it_is(tmp_path: Path) -> None:
    merge(RUN, tmp_path / "merged", base=BASE)
    (tmp_path / "empty").mkdir()
    for folder, what, next_command in (
        (tmp_path / "merged", "made of a run, not a run", "dora-export check"),
        (BASE, "a whole model", "dora-export extract"),
        (MODELS, "a folder of runs, not a run", "dora-export batch"),
        (tmp_path / "empty", "no run found", "give the checkpoint"),
    ):
        done = export("inspect", folder)
        assert done.exit_code == 1
        assert what in done.stderr and next_command in done.stderr
        assert "\\n" not in done.stderr
    assert "Tiny_" in export("inspect", MODELS).stderr
    assert "peft_type" in export("inspect", tmp_path / "empty", "--method", "peft_lora").stderr


@pytest.mark.parametrize(
    "words",
    [("check", "x/no"), ("lint", "x/y/no"), ("batch", "x/no", "out"),
     ("merge", RUN, "out", "--base", "./no"), ("merge", RUN, "out", "--base", "/x/no"),
     ("inspect", "x/y/no"), ("verify", RUN, "x/no", "--base", BASE)],
)  # fmt: skip
def test_a_path_that_is_not_there_is_called_a_path(words: tuple[object, ...]) -> None:
    done = export(*words)
    assert done.exit_code == 1
    assert "there is no such path" in done.stderr and "no\n" in done.stderr


def test_a_plan_of_nothing_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(dora_serve, ["plan", str(tmp_path)])
    assert done.exit_code == 1 and "no base model lies here" in done.stderr


def test_the_command_that_is_printed_runs_as_printed(tmp_path: Path) -> None:
    """With what the run itself does not say, and names that a shell would take apart."""
    checkpoint = Path(shutil.copytree(RUN / "checkpoint", tmp_path / "a run's" / "checkpoint"))
    given = ("--lora-alpha", "16", "--start-rank", "12", "--base", BASE)
    done = export("merge", checkpoint, tmp_path / "out put", *given)
    assert done.exit_code == 0, done.stderr
    (line,) = (each for each in done.stdout.splitlines() if "check it: dora-export " in each)
    words = shlex.split(line.partition("check it: dora-export ")[2])
    assert export(*words).exit_code == 0
    assert words[-4:] == ["--lora-alpha", "16.0", "--start-rank", "12"]
