"""Where and how a command is started has no power over it: its folder, its streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_serve.server.prepare import child
from dora_serve.server.prepare.child import make_offer
from tests.dora_serve.test_commands import EXPORT

# Each starts an interpreter of its own.
STARTS = {
    "prepare": """
from dora_serve.server.prepare.child import make_offer
make_offer(Path("empty"), None, True)
""",
    "bounded": """
import asyncio
from dora_serve.server.bounded.process import Process
async def ask():
    process = Process()
    await process.start()
    await process.close()
asyncio.run(ask())
""",
    "builder": """
from converters.targets.onnx.decoder import _build
_build(Path("empty"), Path("built"), "fp32", False)
""",
    "batch": """
import multiprocessing
from dora_serve.batch.local import _Worker
_Worker(multiprocessing.get_context("forkserver"), [0]).stop()
""",
}
RUN = "from dora_serve.commands import run_export; run_export()"


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(n, marks=pytest.mark.further) if n in ("batch", "builder") else n
        for n in STARTS
    ],
)
def test_nothing_of_the_current_folder_is_run(place: str, tmp_path: Path) -> None:
    """Where models of others lie, `python -m` and `-c` would take their modules for ours."""
    for module in ("dora_serve", "multiprocessing", "onnxruntime_genai"):
        (tmp_path / f"{module}.py").write_text("open('was run', 'w')\nraise SystemExit\n")
    (tmp_path / "empty").mkdir()
    # As an installed command, and unlike with -P, which is handed on to what is started.
    code = f"import sys\nsys.path.remove('')\nfrom pathlib import Path\n{STARTS[place]}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120
    )
    assert not (tmp_path / "was run").exists()
    assert done.returncode == 0, done.stderr


@pytest.mark.further
def test_closed_streams(llama_lora: Path, tmp_path: Path) -> None:
    """As a service manager may leave them; each of them alone is in test_untold.py."""
    page = tmp_path / "page.html"
    words = [sys.executable, "-P", "-c", RUN, "inspect", str(llama_lora), "--html", str(page)]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    assert subprocess.run(closed, timeout=60).returncode == 0
    assert page.read_text().rstrip().endswith("</html>")


@pytest.mark.further
def test_a_current_folder_that_is_gone(llama_lora: Path, tmp_path: Path) -> None:
    """An error says so; a server that began there takes further adapters all the same."""
    gone = tmp_path / "gone"
    command = f"from shutil import rmtree; rmtree({str(gone)!r}); {RUN}"
    later = f"""
from pathlib import Path
from shutil import rmtree
from dora_serve.server.prepare.child import make_offer
rmtree({str(gone)!r})
print(make_offer(Path({str(llama_lora.parent)!r}), None, True).problems)
"""
    for code, words, expected in ((command, ["inspect", str(llama_lora)], 1), (later, [], 0)):
        gone.mkdir()
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *words],
            cwd=gone,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr


def test_a_locale_without_a_names_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a matter of that folder alone."""
    folder = tmp_path / "模型"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    monkeypatch.setattr(child, "sys", sys)  # a process that begins in that locale
    monkeypatch.setenv("LC_ALL", "C")
    for name in ("PYTHONUTF8", "PYTHONCOERCECLOCALE"):  # else Python takes UTF-8 all the same
        monkeypatch.setenv(name, "0")
    (why,) = make_offer(tmp_path, None, True).problems.values()
    assert "signs that cannot be shown" in why


@pytest.mark.parametrize("words", [[], pytest.param(["--json"], marks=pytest.mark.further)])
@pytest.mark.further
def test_an_output_that_lacks_a_names_signs(
    words: list[str], llama_lora: Path, tmp_path: Path
) -> None:
    """Neither people nor programs are told less."""
    out = tmp_path / "é模🌍"
    done = subprocess.run(
        [EXPORT, "adapter", llama_lora, out, *words],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        encoding="latin-1",
        check=True,
    )
    assert r"é\u6a21\ud83c\udf0d" in done.stdout
    if words:
        assert str(out) in json.loads(done.stdout).values()
