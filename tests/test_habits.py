"""What is told in one place only is told there: the version, the tools of a commit, the image; and
every test checks something."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from .asserting import may_check_nothing

ROOT = Path(__file__).parent.parent
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_version_has_one_place() -> None:
    number = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version("dora-serve") == number
    assert f"## {number}" in (ROOT / "CHANGELOG.md").read_text()
    code = [*(ROOT / "converters").rglob("*.py"), *(ROOT / "dora_serve").rglob("*.py")]
    assert len(code) > 200
    assert [file for file in code if f'"{number}"' in file.read_text()] == []


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda f: f.name)
def test_workflows_and_templates_are_read(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_workflows_make_what_there_is() -> None:
    text = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    made = re.findall(r"make:? ([a-z][\w-]*)", text)
    assert {"lint", "test", "test-lowest", "test-newest", "docs", "release"} <= set(made) <= TARGETS


def test_a_commit_is_checked_by_the_tools_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    told = {shlex.split(hook["entry"])[0].removeprefix(".venv/bin/") for hook in hooks}
    assert told == {"ruff", "mypy"}


def test_the_image_copies_what_is_there_and_runs_what_is_installed() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert len(copied) >= 4
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in (ROOT / ".containerignore").read_text().splitlines()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entry,) = (line for line in lines if line.startswith("ENTRYPOINT "))
    assert yaml.safe_load(entry.removeprefix("ENTRYPOINT "))[0] in scripts


def test_no_test_checks_only_in_a_loop_that_may_be_empty() -> None:
    trees = [ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("*.py")]
    assert len(trees) > 100
    assert may_check_nothing(trees) == []


LOOPS = {
    "for x in found():\n  assert x": False,
    "for x in [f for f in (1, 2) if f > 2]:\n  assert x": False,
    "assert all(x for x in found())": False,
    "for x in found():\n  for y in (1, 2):\n    assert x": False,
    "for x in found():\n  with raises(E):\n    x()": False,
    "for x in (1, 2):\n  assert x": True,
    "some = [1]\nfor x in enumerate(some):\n  assert x": True,
    "found = [1]\nfound = find()\nfor x in found:\n  assert x": False,
    "assert found\nfor x in found:\n  assert x": True,
    "for x in found():\n  assert x\nwith raises(E):\n  f()": True,
    "if a:\n  assert a\nelse:\n  f()": True,
}


@pytest.mark.parametrize(("body", "fine"), LOOPS.items())
def test_loops_that_may_be_empty_are_found(body: str, fine: bool) -> None:
    test = ast.parse("def test_it():\n" + "\n".join(f"  {line}" for line in body.split("\n")))
    assert bool(may_check_nothing([test])) is not fine


def test_the_picture_of_the_benchmarks_is_of_what_the_tables_say() -> None:
    path = ROOT / "scripts" / "bench_picture.py"
    spec = importlib.util.spec_from_file_location("bench_picture", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = (ROOT / "docs" / "benchmarks.md").read_text()
    found = [
        script.number(table, row, column) for *_, column, rows in script.PANELS for row in rows
    ]
    assert found[:6] == [1.66, 18.06, 174, 2442, 68.1, 228.2] and len(found) == 11
    with pytest.raises(ValueError, match="unpack"):
        script.number(table, "no such row", 1)
