"""What docs/architecture.md promises of the house: its arrows, its circles, its sizes."""

from __future__ import annotations

import ast
import os
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import made_once

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("converters", "dora_serve")
    for path in sorted((ROOT / package).rglob("*.py"))
}
# vLLM's and llama.cpp's own flags, which are not ours.
OTHERS = ("--max-lora-rank", "--lora", "--extra_options")


def imports(module: str) -> set[str]:
    """The modules of ours that `module` imports, at its head or inside a function, but not what it
    needs for its types alone."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names = [start, *(f"{start}.{alias.name}" for alias in node.names)]
            if f"{start}.{node.names[0].name}" in FILES:
                names = names[1:]  # the package is passed through, not used
        else:
            continue
        found |= {name for name in names if name in FILES}
    return found - {module}


@pytest.fixture(scope="module", autouse=True)
def _one_worker(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests of this file, as those of every other, run in one worker: what a file makes once,
    a server say, is not made once more."""
    mine = os.environ.get("PYTEST_XDIST_WORKER", "alone")

    def sign(folder: Path) -> None:
        folder.mkdir()
        (folder / "worker").write_text(mine)

    assert (made_once(tmp_path_factory, "worker", sign) / "worker").read_text() == mine


def test_no_file_imports_another_in_a_circle() -> None:
    graph = {module: imports(module) for module in FILES}
    assert graph["dora_serve.api"], "nothing was read"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_converters_does_not_know_dora_serve() -> None:
    known = {module: imports(module) for module in FILES if module.startswith("converters")}
    assert len(known) > 20
    assert {
        m for m, names in known.items() if any(n.startswith("dora_serve") for n in names)
    } == set()


def test_every_file_has_one_reason_to_exist() -> None:
    rest = (path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py"))
    lines = {path: len(path.read_text().splitlines()) for path in [*FILES.values(), *rest]}
    assert {path.parts[len(ROOT.parts)] for path in lines} == {
        *("converters", "dora_serve", "tests", "scripts")
    }
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_the_library_names_no_flag_of_the_command_line() -> None:
    flags = {
        f"{module}: {flag}"
        for module, path in FILES.items()
        if module.startswith("converters")
        for flag in re.findall(r"(?<![-\w])--[a-z][\w-]*", path.read_text())
        if flag not in OTHERS and not flag.startswith("--lora")
    }
    assert flags == set()
