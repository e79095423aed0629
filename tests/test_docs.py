"""Every command and every Python block of README.md and docs/ runs as written.

`sh` blocks run in a folder that sees `models/`, with the file names the text uses. A block after
`<!-- not run: reason -->` is left out, `make` lines are run by continuous integration.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_command_runs(page: Path, tmp_path: Path) -> None:
    shell, python = script(page)
    for name in ("models", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    for command in (
        ["bash", "-euo", "pipefail", "-c", shell],
        *([sys.executable, "-c", p] for p in python),
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
