"""Weights of 4 bits fitted to a text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from converters.errors import DoraExportError
from converters.targets.onnx import fitted
from converters.targets.onnx.quantized import Fit, _fitted, scaled
from dora_serve import write_onnx
from dora_serve.commands import dora_export
from tests.conftest import LLAMA_RUNS, MODELS

BASE = MODELS / "tiny-llama-base"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the sample's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    drawn = random.Random(1).choices(sorted(words), k=3000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(drawn))
    return path


def restored(scales: np.ndarray, zeros: np.ndarray, values: np.ndarray) -> np.ndarray:
    found: np.ndarray = ((values - zeros) * scales).reshape(len(values), -1).astype(np.float64)
    return found


def test_what_a_matrix_multiplies_changes_less() -> None:
    """By ‖X(W − Ŵ)ᵀ‖ of inputs that go together; where none do, no weight is further off."""
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(40, 96)).astype(np.float32)
    inputs = (draw.normal(size=(600, 12)) @ draw.normal(size=(12, 96))).astype(np.float32)
    inputs += 0.3 * draw.normal(size=inputs.shape).astype(np.float32)
    blocks = matrix.reshape(40, 3, 32)
    losses = {}
    for name, found in (
        ("plain", scaled(blocks)),
        ("fitted", _fitted(blocks, fitted._fit(inputs.T @ inputs))),
    ):
        lost = inputs.astype(np.float64) @ (matrix - restored(*found)).T
        losses[name] = float(np.linalg.norm(lost))
    assert losses["fitted"] < 0.5 * losses["plain"]
    apart = _fitted(blocks, Fit(np.ones(96, np.float32), np.eye(96, dtype=np.float32)))
    off, most = (np.abs(restored(*found) - matrix) for found in (apart, scaled(blocks)))
    assert (off <= most + 1e-6).all()


def divergence(folder: Path, ids: list[int]) -> float:
    """Mean KL divergence of a graph from transformers' own model on `ids`."""
    truth = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).eval()
    with torch.no_grad():
        exact = torch.log_softmax(truth(torch.tensor([ids])).logits[0], dim=-1)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    feeds = fitted._feeds(session, np.array([ids]))
    found = torch.log_softmax(torch.from_numpy(session.run(["logits"], feeds)[0][0]).double(), -1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_a_graph_loses_less_in_fewer_bytes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted, "_MEMORY", 50_000)  # several readings of the text
    plain = write_onnx(BASE, tmp_path / "plain", precision="int4")
    fit = write_onnx(BASE, tmp_path / "fit", precision="int4", calibrate=text)
    assert fit.written and plain.written
    words = "count : nine eight seven six five four three two one every second one three five"
    ids = AutoTokenizer.from_pretrained(BASE)(words).input_ids
    assert divergence(tmp_path / "fit", ids) < divergence(tmp_path / "plain", ids)
    sizes = [(tmp_path / n / "model.onnx.data").stat().st_size for n in ("fit", "plain")]
    assert sizes[0] < sizes[1]
    told = json.loads((tmp_path / "fit" / "dora_export.json").read_text())
    assert told["calibration"]["name"] == "words.txt" and told["calibration"]["tokens"] >= 512
    assert {path.name for path in (tmp_path / "fit").iterdir()} == {
        path.name for path in (tmp_path / "plain").iterdir()
    }


def test_a_run_with_adapters_beside_it_by_the_command(text: Path, tmp_path: Path) -> None:
    words = ["onnx", "--base", BASE, tmp_path / "out", "--adapter", f"down={LLAMA_RUNS['down']}"]
    words += ["--precision", "int4", "--calibrate", text, "--json"]
    done = CliRunner().invoke(dora_export, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    checked = CliRunner().invoke(
        dora_export,
        ["verify", str(LLAMA_RUNS["down"]), str(tmp_path / "out"), "--base", str(BASE)],
    )
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("precision", "content", "says"),
    [
        ("fp32", None, "nothing is fitted to a text here"),
        ("int8", None, "nothing is fitted to a text here"),
        ("int4", b"one two three", "too short"),
        ("int4", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_what_nothing_can_be_fitted_to(
    precision: str, content: bytes | None, says: str, text: Path, tmp_path: Path
) -> None:
    given = text
    if content is not None:
        given = tmp_path / "text"
        given.write_bytes(content)
    with pytest.raises(DoraExportError, match=says):
        write_onnx(BASE, tmp_path / "out", precision=precision, calibrate=given)
    with pytest.raises(DoraExportError):
        write_onnx(BASE, tmp_path / "out", precision="int4", calibrate=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def gpt2(folder: Path, words: int = 84) -> Path:
    """A base whose configuration has names of its own for its sizes."""
    config = GPT2Config(vocab_size=words, n_positions=48, n_embd=64, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def test_a_short_context_under_another_name(text: Path, tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    write_onnx(base, tmp_path / "out", precision="int4", calibrate=text)
    told = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert told["calibration"]["tokens"] % 48 == 0


@pytest.mark.parametrize("content", [None, "{}"])
def test_bases_that_read_no_text(content: str | None, text: Path, tmp_path: Path) -> None:
    few = gpt2(tmp_path / "few", 20)
    with pytest.raises(DoraExportError, match="no row for"):
        write_onnx(few, tmp_path / "out", precision="int4", calibrate=text)
    (few / "tokenizer.json").unlink()
    if content is not None:
        (few / "tokenizer.json").write_text(content)
    with pytest.raises(DoraExportError, match="no tokenizer that reads"):
        write_onnx(few, tmp_path / "out", precision="int4", calibrate=text)
    assert not (tmp_path / "out").exists()


def test_what_is_further_than_verify_allows_is_told(tmp_path: Path) -> None:
    """A text that says nothing of what the sample reads fits it badly."""
    noise = tmp_path / "noise.txt"
    noise.write_text(" ".join(["count"] * 600))
    told = {}
    for name, precision in (("int8", ["int8"]), ("noise", ["int4", "--calibrate", noise])):
        words = ["onnx", LLAMA_RUNS["down"], tmp_path / name, "--base", BASE, "--json"]
        done = CliRunner().invoke(dora_export, list(map(str, [*words, "--precision", *precision])))
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)["accuracy"]["merged"]
        far = found["top1"] < 0.9 or found["max_abs"] > 0.5 * found["control"]
        told[name] = far, "than dora-export verify allows" in done.stderr
    assert told == {"int8": (False, False), "noise": (True, True)}
