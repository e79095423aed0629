"""Weights that no fusion sees, as those of models beyond what a graph holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from converters.files.onnx_files import MODEL
from converters.model.base import open_base
from converters.targets.onnx import export, graph_file, write_onnx
from converters.targets.onnx.graph_file import GraphWriter, put_inside
from dora_serve import Run, read_run, verify
from dora_serve.onnxruntime.encoder import Encoder
from tests.conftest import DATA, MODELS
from tests.engines.encoders import ROWS, check_adapters, largest

REFERENCE = DATA / "reference"


def everything_is_large(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(export, "_SEEN", 2048)
    patch.setattr(graph_file, "_INSIDE", 0)


@pytest.fixture(scope="module", autouse=True)
def _everything_is_large() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        everything_is_large(patch)
        yield


def check(folder: Path) -> None:
    """The weights lie in one file, and nothing that was beside the graphs is left."""
    graphs = [onnx.load(p, load_external_data=False).graph for p in folder.glob("*.onnx")]
    outside = [t for g in graphs for t in g.initializer if t.data_location == 1]
    assert {entry.value for t in outside for entry in t.external_data[:1]} == {"model.onnx.data"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} <= {"adapters"}


def reference(name: str) -> tuple[Run, Path]:
    entry = next(e for e in json.loads((REFERENCE / "index.json").read_text()) if e["name"] == name)
    return read_run(REFERENCE / entry["checkpoint"]), REFERENCE / entry["base"]


@pytest.mark.further
def test_an_encoder_with_adapters(tmp_path: Path) -> None:
    run, path = reference("roberta")
    base, runs = open_base(path), {"one": run}
    write_onnx(base, tmp_path / "out", adapters=runs)
    check(tmp_path / "out")
    check_adapters((base, runs, tmp_path / "out"))


# Of BART it is a fixture of test_onnx_seq2seq.py.
@pytest.mark.parametrize("name", [pytest.param("roberta-qa", marks=pytest.mark.further), "llama"])
def test_merged_graphs(name: str, tmp_path: Path) -> None:
    run, path = reference(name)
    base = open_base(path)
    write_onnx(base, tmp_path / "out", run=run)
    check(tmp_path / "out")
    assert verify(run, tmp_path / "out", base).passed


RUN = next(MODELS.glob("runs/Checkpoint/Tiny_Roberta/*/*/*--1"))
BASE = MODELS / "tiny-roberta-base"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "fp32"
    write_onnx(open_base(BASE), out, run=read_run(RUN))
    check(out)
    return out


@pytest.mark.further
def test_a_merged_encoder(full: Path) -> None:
    assert verify(read_run(RUN), full, open_base(BASE)).passed


@pytest.mark.parametrize(
    ("precision", "bound"),
    [("fp16", 5e-3), pytest.param("int8", 0.1, marks=pytest.mark.further), ("int4", 0.3)],
)
def test_other_precisions(full: Path, precision: str, bound: float, tmp_path: Path) -> None:
    small = tmp_path / precision
    small.mkdir()
    shutil.copyfile(full / "config.json", small / "config.json")
    GraphWriter(small, precision).write(MODEL, ir.load(full / MODEL))
    put_inside(small / MODEL)
    check(small)
    sizes = [(out / "model.onnx.data").stat().st_size for out in (small, full)]
    assert sizes[0] < sizes[1]
    assert 0 < largest(Encoder(small).run(ROWS), Encoder(full).run(ROWS)) <= bound
