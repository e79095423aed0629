"""Write docs/support-matrix.md from the tests that carry the marker `supports`, and docs/ties.md
from those that carry `ties`.

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
TIES = ROOT / "docs" / "ties.md"
WAYS = ("whole", "lora", "tokens")
TARGETS = ("merged", "peft", "vllm", "sglang", "lorax", "gguf", "onnx")

Cells = dict[tuple[str, ...], dict[str, set[str]]]
Ties = dict[tuple[str, str], dict[str, str]]

HEAD = """# Support matrix

Which training method, on which model family, reaches which target. Every dot is a test that
compares what the target computes with the method's own live model (of ALoRA, whose code is not
public, with the published formula); the last column names it.

Where it is computed: merged in transformers, peft in PEFT, onnx in ONNX Runtime. vllm: in vLLM
itself (`tests/engines/vllm/`), or the folder for vLLM computed in PEFT, since every scale is folded
in and both read the same. sglang and lorax: in loaders written after those engines' own. gguf: ΔW
as the `gguf` package reads it back; logits in llama.cpp itself are told in [Targets](targets.md).
base: how its weights are stored, where not as plain floats; on a
[quantized base](targets.md#quantized-bases) an adapter is computed in PEFT, on the dequantized one.

Made by `python scripts/support_matrix.py` from the tests' `supports` markers; continuous
integration checks that it is current.

| method | family | base | {targets} | proved by |
|---|---|---|{rule}|---|
"""

TIES_HEAD = """# Tied weights

What becomes of a run that trained one side of a tensor that the model's class has under several
names: the side whole (`modules_to_save`), by LoRA, or in single rows (`trainable_token_indices`).
●: the merged model and the adapter compute what PEFT's live model computes;
whoever keeps the old value is then a tensor of its own, and the configuration says so. Else the
reason for which it is refused. Every cell is a case of `{test}`.

Which sides there are is asked of the class that transformers builds (`all_tied_weights_keys`), so
families that are not listed are treated alike.

Made by `python scripts/support_matrix.py` from the tests' `ties` markers; continuous integration
checks that it is current.

| family | side | {ways} |
|---|---|{rule}|
"""


NAMES = """
## Names

What an engine does with a LoRA folder whose modules are called as other tools call them. Every row
is a test that loads the file as it lies there into the engine: ● where it computes what was
trained, ○ where it does nothing with the file, mostly without a word, which `lint` says; where
there is neither, no test asks. Merges, and adapters that are written anew (`adapter`,
`lint --fix`), are right for every row. vllm: in a running engine, or by the loader and the modules
of the class that vLLM builds. onnx: ONNX Runtime reads no such folder; computed is what
`dora-export onnx` makes of it, beside the graph of the base.

| family | form of name | {engines} | proved by |
|---|---|{rule}|---|
"""
ENGINES = ("peft", "transformers", "vllm", "onnx")


class _Collector:
    """Keeps what the collected tests claim: (method, family, base) → target → test names; (family,
    form of name) → engine → test names, in `deaf` of the engines that the form is lost on; and
    (family, tied side) → way → what becomes of it."""

    def __init__(self) -> None:
        self.cells: Cells = defaultdict(lambda: defaultdict(set))
        self.names: Cells = defaultdict(lambda: defaultdict(set))
        self.deaf: Cells = defaultdict(lambda: defaultdict(set))
        self.ties: Ties = defaultdict(dict)
        self.proof = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            name = f"{item.path.relative_to(ROOT)}::{getattr(item, 'originalname', item.name)}"
            for mark in item.iter_markers("ties"):
                family, side, way, outcome = mark.args
                self.ties[family, side][way] = outcome
                self.proof = name
            for mark in item.iter_markers("supports"):
                for target in mark.kwargs["targets"]:
                    if target not in TARGETS:
                        raise pytest.UsageError(f"{item.nodeid}: unknown target {target}")
                    key = tuple(mark.kwargs.get(k, "") for k in ("method", "family", "base"))
                    self.cells[key][target].add(name)
            for mark in item.iter_markers("named"):
                key = (mark.kwargs["family"], mark.kwargs["form"])
                for engine in mark.kwargs["asked"]:
                    hears = engine in mark.kwargs["computes"]
                    (self.names if hears else self.deaf)[key][engine].add(name)


def collect() -> _Collector:
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(
            ["--collect-only", "-q", "-m", "", str(ROOT / "tests")], plugins=[collector]
        )
    if code:
        raise SystemExit(f"the tests could not be collected:\n{output.getvalue()}")
    return collector


def rows(cells: Cells, columns: tuple[str, ...], deaf: Cells | None = None) -> list[str]:
    """A row of each key of `cells`, and of `deaf`, which has what was asked in vain."""
    lines, vain = [], deaf or {}
    for key in sorted({*cells, *vain}):
        found, lost = cells.get(key, {}), vain.get(key, {})
        dots = " | ".join("●" if c in found else "○" if c in lost else "" for c in columns)
        named = {name for each in (found, lost) for names in each.values() for name in names}
        tests = ", ".join(f"`{name}`" for name in sorted(named))
        lines.append(f"| {' | '.join(key)} | {dots} | {tests} |\n")
    return lines


def page(cells: Cells, names: Cells, deaf: Cells) -> str:
    lines = [HEAD.format(targets=" | ".join(TARGETS), rule="|".join(":-:" for _ in TARGETS))]
    lines += rows(cells, TARGETS)
    methods, families = {key[0] for key in cells}, {key[1] for key in cells}
    lines.append(f"\n{len(methods)} methods, {len(families)} families, {len(cells)} rows.\n")
    lines.append(NAMES.format(engines=" | ".join(ENGINES), rule="|".join(":-:" for _ in ENGINES)))
    lines += rows(names, ENGINES, deaf)
    return "".join(lines)


def ties_page(found: _Collector) -> str:
    rule = "|".join(":-:" for _ in WAYS)
    lines = [TIES_HEAD.format(test=found.proof, ways=" | ".join(WAYS), rule=rule)]
    for (family, side), ways in found.ties.items():
        cells = " | ".join(ways.get(way, "") for way in WAYS)
        lines.append(f"| {family} | `{side}` | {cells} |\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is not current")
    found = collect()
    check = parser.parse_args().check
    for path, current in (
        (PAGE, page(found.cells, found.names, found.deaf)),
        (TIES, ties_page(found)),
    ):
        if not check:
            path.write_text(current)
        elif not path.exists() or path.read_text() != current:
            sys.exit(f"{path.name} is not current: run python scripts/support_matrix.py")


if __name__ == "__main__":
    main()
