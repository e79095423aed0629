"""Every command and every Python block of README.md and docs/ runs as written.

`sh` blocks run in a folder that sees `models/`, with the file names the text uses. A block after
`<!-- not run: reason -->` is left out, `make` lines are run by continuous integration.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import commands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    shell, python = script(page)
    for name in ("models", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{commands()}:{os.environ['PATH']}"}
    for command in (
        ["bash", "-euo", "pipefail", "-c", shell],
        *(["python", "-c", p] for p in python),
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


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
