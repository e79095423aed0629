"""Nothing is sent and nothing fetched: not at import, not by a conversion, not by a proof."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converters import SILENCE
from tests.conftest import MODELS

RUN = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
BASE = MODELS / "tiny-llama-base"

# Python runs this first, in the process of a command and in those that it starts. Libraries that
# do not go through Python's sockets are seen by what they read and write instead.
WATCH = """
import json, os, sys

def seen(event, arguments):
    found = None
    if event == "socket.getaddrinfo":
        found = ["looked up", str(arguments[0])]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        found = ["connected", str(arguments[1][0])]
    elif event == "import" and arguments[0] in {"onnxruntime", "huggingface_hub", "torch"}:
        found = ["imported", arguments[0], {n: os.environ.get(n) for n in %r}]
    if found is None:
        return
    line = json.dumps(found) + "\\n"
    log = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line.encode())
    os.close(log)
    if found[0] != "imported" and found[1] not in {"127.0.0.1", "::1", "localhost"}:
        raise ConnectionRefusedError(line)

sys.addaudithook(seen)
"""

EVERYTHING = """
import importlib, pkgutil, sys
import converters, dora_serve
for package in (converters, dora_serve):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith(("dora_serve.vllm.", "dora_serve.deploy.ray_app")):
            importlib.import_module(module.name)
"""

# The last names its base by a hub id, which is looked up in the local cache only.
CONVERSIONS = """
import sys
from dora_serve.commands import dora_export
run, base, out = sys.argv[1:]
for code, *line in (
    [0, "merge", run, out + "/merged", "--base", base],
    [0, "adapter", run, out + "/adapter", "--base", base],
    [0, "onnx", out + "/graph", "--base", base, "--adapter", run],
    [0, "verify", run, out + "/merged", "--base", base],
    [1, "merge", run, out + "/none", "--base", "some/where"],
):
    try:
        dora_export(line)
    except SystemExit as done:
        assert (done.code or 0) == code, line
"""


class Watched:
    """Runs Python in a home of its own and tells what it did."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self._log = folder / "seen"
        (folder / "hook").mkdir(parents=True)
        (folder / "hook" / "sitecustomize.py").write_text(WATCH % list(SILENCE))
        self.home.mkdir()
        # ONNX Runtime is silent by itself where it recognizes continuous integration.
        own = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "XDG_CACHE_HOME", *SILENCE)
        keep = {name: value for name, value in os.environ.items() if name not in own}
        path = os.pathsep.join((str(folder / "hook"), str(MODELS.parent)))
        self.environment = keep | {
            "HOME": str(self.home),
            "PYTHONPATH": path,
            "WATCHED": str(self._log),
        }

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=self.environment,
            cwd=self.home.parent,
            capture_output=True,
            text=True,
        )

    def seen(self) -> list[list[Any]]:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [json.loads(line) for line in lines]

    def reached(self) -> list[str]:
        return [event[1] for event in self.seen() if event[0] != "imported"]

    def silence(self) -> dict[str, dict[str, str | None]]:
        """Library → the variables as they were when it was first imported by any process."""
        return {e[1]: e[2] for e in reversed(self.seen()) if e[0] == "imported"}


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_the_watch_sees_a_connection_also_of_a_process_it_starts(watched: Watched) -> None:
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert watched("-c", code).returncode != 0
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    watched("-c", outer)
    assert watched.reached().count("192.0.2.1") >= 2


def test_importing_all_modules(watched: Watched) -> None:
    done = watched("-c", EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert watched.reached() == []


def test_every_conversion_of_a_sample_run(watched: Watched, tmp_path: Path) -> None:
    done = watched("-c", CONVERSIONS, RUN, BASE, tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "hf download some/where" in done.stderr
    for name in ("merged/config.json", "adapter/adapter_config.json", "graph/model.onnx"):
        assert (tmp_path / name).exists()
    assert watched.reached() == []
    silence = watched.silence()
    assert silence.keys() >= {"onnxruntime", "huggingface_hub"}
    assert silence["onnxruntime"] == silence["huggingface_hub"] == SILENCE
    # Where it reports, ONNX Runtime keeps an identifier of the machine and what is not yet sent.
    assert not list(watched.home.rglob("*onnxruntime*"))


def test_onnx_runtime_would_report(watched: Watched) -> None:
    """What it leaves behind where it may report, and cannot: the process has no network."""
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("no network of its own to be had")
    for said, expected in (("1", False), ("0", True)):
        environment = watched.environment | {"ORT_DISABLE_TELEMETRY": said}
        subprocess.run([*alone, sys.executable, "-c", "import onnxruntime"], env=environment)
        assert bool(list(watched.home.rglob("*onnxruntime*"))) is expected


def test_what_the_user_says_holds(watched: Watched) -> None:
    code = "import os, dora_serve; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert watched("-c", code).stdout.strip() == "1"
    said = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; "
    assert watched("-c", said + code).stdout.strip() == "0"
