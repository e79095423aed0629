"""Weights beside the graph while it is made, as for models beyond what a graph holds."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from converters.model.base import open_base
from converters.targets.onnx import export, write_onnx
from dora_serve import DoraExportError, Run, read_run, verify
from tests.conftest import DATA, MODELS
from tests.engines.encoders import check_adapters

REFERENCE = DATA / "reference"


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGE", 0)
    monkeypatch.setattr(export, "_OUTSIDE_FROM", 2048)


def check(folder: Path) -> None:
    """The weights lie in one file, and nothing that was beside the graphs is left."""
    graphs = [onnx.load(p, load_external_data=False).graph for p in folder.glob("*.onnx")]
    outside = [t for g in graphs for t in g.initializer if t.data_location == 1]
    assert {entry.value for t in outside for entry in t.external_data[:1]} == {"model.onnx.data"}
    assert not (folder / ".exported").exists()


def reference(name: str) -> tuple[Run, Path]:
    entry = next(e for e in json.loads((REFERENCE / "index.json").read_text()) if e["name"] == name)
    return read_run(REFERENCE / entry["checkpoint"]), REFERENCE / entry["base"]


def test_an_encoder_with_adapters(tmp_path: Path) -> None:
    run, path = reference("roberta")
    base, runs = open_base(path), {"one": run}
    write_onnx(base, tmp_path / "out", adapters=runs)
    check(tmp_path / "out")
    check_adapters((base, runs, tmp_path / "out"))


@pytest.mark.parametrize("name", ["roberta-qa", "bart", "llama"])
def test_merged_graphs(name: str, tmp_path: Path) -> None:
    run, path = reference(name)
    base = open_base(path)
    write_onnx(base, tmp_path / "out", run=run)
    check(tmp_path / "out")
    assert verify(run, tmp_path / "out", base).passed


def test_other_precisions_are_refused(tmp_path: Path) -> None:
    run = read_run(next(MODELS.glob("runs/Checkpoint/Tiny_Roberta/*/*/*--1")))
    base = open_base(MODELS / "tiny-roberta-base")
    with pytest.raises(DoraExportError, match="too large for this precision"):
        write_onnx(base, tmp_path / "out", run=run, precision="int8")
    assert list(tmp_path.iterdir()) == []
