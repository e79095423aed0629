"""The command line as a user and a script meet it: real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import commands

EXPORT = Path(sys.executable).parent / "dora-export"


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [str(commands() / "dora-export"), *(str(argument) for argument in arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dora_serve.commands import dora_export\n"
        "dora_export(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'numpy', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("inspect", "merge", "adapter", "verify"):
        assert verb in done.stdout
        assert "Usage" in export(verb, "--help").stdout


def test_a_mistyped_verb_gets_a_hint() -> None:
    done = export("merg")
    assert done.returncode == 2
    assert "Did you mean merge?" in done.stderr


def test_an_error_is_one_message_without_traceback(tmp_path: Path) -> None:
    done = export("merge", tmp_path / "nothing", tmp_path / "out", "--json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no such run")
    assert json.loads(done.stdout)["error"]["code"] == "MissingError"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--png", "--html"])
def test_a_path_that_cannot_be_written_is_an_error(option: str, dora_run: Path) -> None:
    done = export("inspect", dora_run, option, "nowhere/picture")
    assert done.returncode == 1
    assert (
        done.stderr == "error: no such folder, or no permission to write to it\n  file: nowhere\n"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("matplotlib", "plot", ("inspect", "--png", "ranks.png")),
        ("onnx", "onnx", ("onnx", "onnx-folder", "--base", "BASE")),
        ("peft", "peft", ("verify", "ADAPTER", "--base", "BASE")),
        ("onnx_ir", "onnx", ("onnx", "onnx-folder", "--base", "BASE")),
        ("onnxscript", "onnx", ("onnx", "onnx-folder", "--base", "BASE")),
        ("uvicorn", "serve", ("up", "--dry-run")),
        ("onnxruntime", "onnx", ("up", "--dry-run")),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    package: str,
    extra: str,
    arguments: tuple[str, ...],
    dora_run: Path,
    llama_base: Path,
    llama_lora: Path,
) -> None:
    places = {"BASE": str(llama_base), "ADAPTER": str(llama_lora)}
    verb, *more = (places.get(word, word) for word in arguments)
    program = "dora_serve" if verb == "up" else "dora_export"
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from dora_serve.commands import {program}\n"
        f"{program}({[verb, str(dora_run), *more]!r})"
    )
    python = commands() / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    # bitsandbytes, which PEFT imports where it is there, may say something first.
    assert f"error: this needs the package {package}" in done.stderr
    assert done.stderr.endswith(f"pip install 'dora-serve[{extra}]'\n")
    assert "Traceback" not in done.stderr


def test_the_base_must_be_named(dora_run: Path, tmp_path: Path) -> None:
    done = export("merge", dora_run, tmp_path / "out")
    assert done.returncode == 1
    assert "--base" in done.stderr


def test_quiet_when_piped(dora_run: Path, llama_base: Path, tmp_path: Path) -> None:
    done = export("merge", dora_run, tmp_path / "out", "--base", llama_base)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in export("inspect", dora_run).stdout


def test_dry_run_writes_nothing(dora_run: Path, llama_base: Path, tmp_path: Path) -> None:
    for verb in ("merge", "adapter"):
        done = export(verb, dora_run, tmp_path / "o", "--base", llama_base, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["bytes"] > 0
        assert not (tmp_path / "o").exists()


def test_verify_exits_1_for_an_artifact_of_another_run(
    dora_run: Path, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    assert export("merge", llama_lora, tmp_path / "out", "--base", llama_base).returncode == 0
    done = export("verify", dora_run, tmp_path / "out", "--base", llama_base)
    assert done.returncode == 1
    assert "FAILED" in done.stdout


SLOW = """
import sys, time
from pathlib import Path
from converters.files.output import output_folder
with output_folder(Path(sys.argv[1])) as folder:
    (folder / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.further), signal.SIGKILL]
)
def test_a_stopped_command_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    target = tmp_path / "work" / "out"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        os.kill(process.pid, sent)
        assert process.wait(20) != 0
    deadline = time.monotonic() + 5
    while target.parent.exists() and any(target.parent.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
