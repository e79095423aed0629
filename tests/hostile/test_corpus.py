"""Every hostile folder ends in one of our errors, in time, without a trace."""

from __future__ import annotations

import json
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.readers import patterns
from dora_serve import DoraExportError, merge, read_run, write_adapter
from dora_serve.commands import dora_export

from .corpus import CASES
from .folders import SECRET, Case

SECONDS = 20  # a bomb is given up after two
GROWTH = 200_000  # KB of memory at the peak, more than before


def folders(case: Case, run: Path, adapter: Path, base: Path) -> tuple[Path, Path]:
    """Run and base, one of which is spoiled."""
    source = run if case.kind == "run" else adapter
    case.spoil(base if case.kind == "base" else source)
    return source, base


@pytest.fixture
def base(llama_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_base, tmp_path / "base"))


@pytest.fixture
def adapter(llama_lora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_lora, tmp_path / "adapter"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_there_are_enough_and_each_is_another() -> None:
    assert len(CASES) >= 60
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES)


@pytest.fixture(autouse=True)
def _short_patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For patterns that never end, which every verb would wait for."""
    if "bomb" in request.node.name:
        monkeypatch.setattr(patterns, "SECONDS", 0.2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_refused(case: Case, dora_run: Path, adapter: Path, base: Path, work: Path) -> None:
    run, base = folders(case, dora_run, adapter, base)
    begin, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = []
    verbs: list[Callable[[], object]] = [
        lambda: read_run(run),
        lambda: merge(run, "merged", base=base),
        lambda: write_adapter(run, "repacked", base=base),
    ]
    for verb in verbs:
        try:
            verb()
        except DoraExportError as error:
            said.append(str(error))
    for out in work.iterdir():  # not every verb has to look at what is wrong
        assert out.name in ("merged", "repacked")
        shutil.rmtree(out)
    assert any(re.search(case.says, text) for text in said), said
    assert not any(SECRET in text for text in said)
    assert time.monotonic() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < GROWTH


@pytest.mark.parametrize("case", CASES[:: len(CASES) // 12], ids=lambda case: case.name)
def test_the_command_says_so(
    case: Case, dora_run: Path, adapter: Path, base: Path, work: Path
) -> None:
    run, base = folders(case, dora_run, adapter, base)
    words = ["merge", str(run), "out", "--base", str(base), "--json"]
    done = CliRunner().invoke(dora_export, words)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert json.loads(done.stdout)["error"]["message"]
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("kind", ["adapter", "run"])
def test_unspoiled_all_pass(
    kind: str, dora_run: Path, adapter: Path, base: Path, work: Path
) -> None:
    run = adapter if kind == "adapter" else dora_run
    merge(run, "merged", base=base)
    write_adapter(run, "repacked", base=base)
    assert len(list(work.iterdir())) == 2
