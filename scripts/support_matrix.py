"""Write docs/support-matrix.md from the tests that carry the marker `supports`.

    python scripts/support_matrix.py [--check]

A cell stands in the table when a test claims it; the suite, which must pass, makes the claim true.
With `--check` nothing is written, and a page that is not current exits 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support-matrix.md"
TARGETS = ("merged", "peft", "vllm", "sglang", "lorax", "gguf", "onnx")

Cells = dict[tuple[str, str], dict[str, set[str]]]

HEAD = """# Support matrix

Which training method, on which model family, reaches which target. Every dot is a test that
compares what the target computes with the method's own live model (of ALoRA, whose code is not
public, with the published formula); the last column names it.

Where it is computed: merged in transformers, peft in PEFT, onnx in ONNX Runtime. vllm: in vLLM
itself (`tests/engines/vllm/`), or the folder for vLLM computed in PEFT, since every scale is folded
in and both read the same. sglang and lorax: in loaders written after those engines' own. gguf: ΔW
as the `gguf` package reads it back; logits in llama.cpp itself are told in [Targets](targets.md).

Made by `python scripts/support_matrix.py` from the tests' `supports` markers; continuous
integration checks that it is current.

| method | family | {targets} | proved by |
|---|---|{rule}|---|
"""


NAMES = """
## Names

What an engine does with a LoRA folder whose modules are called as other tools call them. Every row
is a test that loads the file as it lies there into the engine: a dot where the engine computes what
was trained. Where there is none it does nothing with the file, without a word, and `lint` says so.
Merges, and adapters that are written anew (`adapter`, `lint --fix`), are right for every row.

| family | form of name | {engines} | proved by |
|---|---|{rule}|---|
"""
ENGINES = ("peft", "transformers")


class _Collector:
    """Keeps what the collected tests claim: (method, family) → target → test names, and the same of
    (family, form of name) → engine."""

    def __init__(self) -> None:
        self.cells: Cells = defaultdict(lambda: defaultdict(set))
        self.names: Cells = defaultdict(lambda: defaultdict(set))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("supports"):
                name = f"{item.path.relative_to(ROOT)}::{getattr(item, 'originalname', item.name)}"
                for target in mark.kwargs["targets"]:
                    if target not in TARGETS:
                        raise pytest.UsageError(f"{item.nodeid}: unknown target {target}")
                    key = (mark.kwargs["method"], mark.kwargs["family"])
                    self.cells[key][target].add(name)
            for mark in item.iter_markers("named"):
                name = f"{item.path.relative_to(ROOT)}::{getattr(item, 'originalname', item.name)}"
                for engine in ("", *mark.kwargs["computes"]):
                    self.names[mark.kwargs["family"], mark.kwargs["form"]][engine].add(name)


def collect() -> tuple[Cells, Cells]:
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(
            ["--collect-only", "-q", "-m", "", str(ROOT / "tests")], plugins=[collector]
        )
    if code:
        raise SystemExit(f"the tests could not be collected:\n{output.getvalue()}")
    return collector.cells, collector.names


def rows(cells: Cells, columns: tuple[str, ...]) -> list[str]:
    lines = []
    for (first, second), found in sorted(cells.items()):
        dots = " | ".join("●" if column in found else "" for column in columns)
        tests = ", ".join(f"`{n}`" for n in sorted({n for names in found.values() for n in names}))
        lines.append(f"| {first} | {second} | {dots} | {tests} |\n")
    return lines


def page(cells: Cells, names: Cells) -> str:
    lines = [HEAD.format(targets=" | ".join(TARGETS), rule="|".join(":-:" for _ in TARGETS))]
    lines += rows(cells, TARGETS)
    methods, families = {m for m, _ in cells}, {f for _, f in cells}
    lines.append(f"\n{len(methods)} methods, {len(families)} families, {len(cells)} rows.\n")
    lines.append(NAMES.format(engines=" | ".join(ENGINES), rule="|".join(":-:" for _ in ENGINES)))
    lines += rows(names, ENGINES)
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is not current")
    current = page(*collect())
    if not parser.parse_args().check:
        PAGE.write_text(current)
    elif not PAGE.exists() or PAGE.read_text() != current:
        sys.exit("docs/support-matrix.md is not current: run python scripts/support_matrix.py")


if __name__ == "__main__":
    main()
