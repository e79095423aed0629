"""Every command and every Python block of README.md and docs/ runs as written.

`sh` blocks run in a folder that sees `models/`, with the file names the text uses. A block after
`<!-- not run: reason -->` is left out, `make` lines are run by continuous integration.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.processes import commands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(<!-- not run: [^\n]*-->\n+)?```(sh|python)\n(.*?)```", re.DOTALL)


def script(page: Path) -> tuple[str, list[str]]:
    """The page's shell script, and its Python blocks."""
    shell, python = [], []
    for skipped, kind, code in _BLOCK.findall(page.read_text()):
        if skipped:
            continue
        if kind == "python":
            python.append(code)
        else:
            shell += [line for line in code.splitlines() if not line.startswith("make ")]
    return "\n".join(shell), python


RUNNING = [page for page in PAGES if any(script(page))]


def test_what_is_to_run_is_found() -> None:
    assert len(RUNNING) >= 10
    assert sum(len(script(page)[1]) for page in PAGES) >= 3
    assert sum(script(page)[0].count("dora-") for page in PAGES) >= 30


@pytest.mark.parametrize("page", RUNNING, ids=[page.name for page in RUNNING])
def test_every_command_runs(page: Path, tmp_path: Path) -> None:
    for name in ("models", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    shell, python = script(page)
    run(["bash", "-euo", "pipefail", "-c", shell], tmp_path)
    for code in python:
        run(["python", "-c", code], tmp_path)


def run(command: list[str], folder: Path, **variables: str) -> None:
    path = f"{commands()}:{os.environ['PATH']}"
    environment = {**os.environ, **variables, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_workflow_for_users_runs(tmp_path: Path) -> None:
    """Its commands, that is, without the actions of others and the installation."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    page = (ROOT / "docs" / "tutorials" / "ci.md").read_text()
    told = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert told is not None
    job = yaml.safe_load(told[1])["jobs"]["prove"]
    lines = [step["run"] for step in job["steps"] if step.get("run", "").startswith("dora-")]
    assert len(lines) == 3
    for line in lines:
        run(["bash", "-euo", "pipefail", "-c", line], tmp_path, **job["env"])
    assert json.loads((tmp_path / "proof.json").read_text())["passed"]


def test_the_reference_has_every_verb_and_path(tmp_path: Path) -> None:
    from dora_serve.commands.examples import EXAMPLES

    run([sys.executable, str(ROOT / "scripts" / "reference.py"), str(tmp_path)], ROOT)
    shown = (tmp_path / "commands.md").read_text()
    assert {line.split()[-1] for line in shown.splitlines() if line.startswith("### ")} == {
        *EXAMPLES
    }
    paths = (tmp_path / "http.md").read_text()
    for path in ("GET /v1/models", "POST /v1/completions", "POST /classify", "POST /v1/embeddings"):
        assert f"## {path}\n" in paths
    assert "| `max_tokens` | integer |" in paths


def test_every_variable_is_told() -> None:
    """Those that our own code reads."""
    names = {
        name
        for folder in ("converters", "dora_serve")
        for file in (ROOT / folder).rglob("*.py")
        for name in re.findall(r'"(DORA_SERVE_[A-Z_]+)"', file.read_text())
    }
    told = (ROOT / "docs" / "reference" / "environment.md").read_text()
    assert len(names) >= 5
    assert {name for name in names if f"`{name}`" not in told} == set()


def test_every_local_link_leads_somewhere() -> None:
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())
        if "://" not in link
    ]
    assert len(links) >= 30
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"
