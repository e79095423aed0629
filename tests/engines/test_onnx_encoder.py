"""Encoders in ONNX Runtime against the live runs: merged, and with adapters in every row."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.torch import load_file

from converters.errors import DoraExportError, TensorFileError
from converters.model.base import open_base
from converters.readers import read_run
from converters.run import Run
from converters.targets.onnx import add_adapters, write_onnx
from converters.targets.onnx.graph_file import GraphWriter, put_inside
from dora_serve.onnxruntime.encoder import Encoder
from dora_serve.onnxruntime.session import EngineError
from dora_serve.proof.onnxruntime import prove
from tests.conftest import DATA, MODELS
from tests.engines.decoders import in_floats
from tests.engines.encoders import (
    BOUND,
    DEBERTA,
    DISTILBERT,
    MIXED,
    ROWS,
    SIZES,
    Built,
    check_adapters,
    dequantize,
    largest,
    live_rows,
    tiny_base,
    tiny_lora,
)

REFERENCE = DATA / "reference"
ROUNDED = 0.01  # of a logit, where activations are rounded to 8 bits
INDEX: list[dict[str, Any]] = json.loads((REFERENCE / "index.json").read_text())
SAMPLE = next(MODELS.glob("runs/Checkpoint/Tiny_Roberta/*/*/*--1"))


def supports(method: str, family: str) -> pytest.MarkDecorator:
    return pytest.mark.supports(method=method, family=family, targets=("onnx",))


def reference_runs(*names: str) -> dict[str, Run]:
    return {e["name"]: read_run(REFERENCE / e["checkpoint"]) for e in INDEX if e["name"] in names}


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Built:
    base, run = open_base(MODELS / "tiny-roberta-base"), read_run(SAMPLE)
    out = tmp_path_factory.mktemp("sample") / "onnx"
    write_onnx(base, out, run=run)
    return base, {"merged": run}, out


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Built:
    base = open_base(REFERENCE / "bases/roberta")
    runs = reference_runs("roberta", "roberta-bin", "roberta-unfinished")
    out = tmp_path_factory.mktemp("roberta") / "onnx"
    write_onnx(base, out, adapters=runs)
    return base, runs, out


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Built:
    base, runs = open_base(REFERENCE / "bases/roberta"), reference_runs("roberta-qa")
    out = tmp_path_factory.mktemp("qa") / "onnx"
    write_onnx(base, out, adapters=runs)
    return base, runs, out


@pytest.fixture(scope="session")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Adapters with 3 labels, with 2, and for a regression; LoRA on the head too."""
    folder = tmp_path_factory.mktemp("distilbert")
    base = tiny_base("DistilBert", folder / "base", DISTILBERT)
    runs = {}
    for name, labels, targets in (
        ("three", 3, ["q_lin", "v_lin", "lin1"]),
        ("two", 2, ["k_lin", "out_lin", "lin2"]),
        ("score", 1, ["q_lin"]),
    ):
        path = tiny_lora(
            base,
            "DistilBertForSequenceClassification",
            folder / name,
            labels,
            target_modules=targets,
            rank_pattern={"layer.0.attention.q_lin": 2},
            modules_to_save=["pre_classifier", "classifier"],
            task_type="SEQ_CLS",
        )
        runs[name] = read_run(path)
    write_onnx(open_base(base), folder / "onnx", adapters=runs)
    return open_base(base), runs, folder / "onnx"


@pytest.fixture(scope="session")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("deberta")
    base = tiny_base("DebertaV2", folder / "base", DEBERTA)
    runs = {
        name: read_run(
            tiny_lora(
                base,
                "DebertaV2ForSequenceClassification",
                folder / name,
                3,
                target_modules=["query_proj", "key_proj", "value_proj"],
                modules_to_save=["pooler", "classifier"],
                task_type="SEQ_CLS",
            )
        )
        for name in ("a", "bb")
    }
    write_onnx(open_base(base), folder / "onnx", adapters=runs)
    return open_base(base), runs, folder / "onnx"


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base("Bert", tmp_path_factory.mktemp("bert") / "base", SIZES)


@pytest.fixture(scope="session")
def tags(bert_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("tags")
    path = tiny_lora(
        bert_base,
        "BertForTokenClassification",
        folder / "lora",
        5,
        target_modules=["query", "dense"],
        task_type="TOKEN_CLS",
    )
    run = read_run(path)
    write_onnx(open_base(bert_base), folder / "onnx", run=run)
    return open_base(bert_base), {"merged": run}, folder / "onnx"


def test_merged_sample(sample: Built) -> None:
    base, runs, out = sample
    truth = live_rows(runs["merged"], base, ROWS)
    found = Encoder(out).run(ROWS)
    assert largest(found, truth) <= BOUND
    assert largest(found, live_rows(runs["merged"], base, ROWS, attached=False)) > 1e-2


def test_merged_sample_tells_good_from_bad(sample: Built) -> None:
    texts = ["the film was very good .", "the film was very bad .", "the meal is not bad ."]
    found = Encoder(sample[2], threads=1).classify(texts)
    assert [each.index for each in found] == [1, 0, 1]
    assert all(sum(each.scores) == pytest.approx(1) for each in found)


def test_the_graph_is_fused_and_tells_nothing_of_this_machine(sample: Built) -> None:
    model = onnx.load(sample[2] / "model.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert {"SkipLayerNormalization", "BiasGelu"} <= kinds
    assert not any(node.metadata_props for node in model.graph.node)
    assert str(Path(__file__).parent.parent) not in str(model.graph)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("int8", 0.1), ("int4", 0.3)])
def test_precisions(sample: Built, tmp_path: Path, precision: str, bound: float) -> None:
    full = Encoder(sample[2]).run(ROWS)
    (tmp_path / "config.json").write_bytes((sample[2] / "config.json").read_bytes())
    GraphWriter(tmp_path, precision).write("model.onnx", ir.load(sample[2] / "model.onnx"))
    put_inside(tmp_path / "model.onnx")
    kinds = {"fp16": "Cast", "int8": "MatMulInteger", "int4": "MatMulNBits"}
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert kinds[precision] in {node.op_type for node in nodes}
    found = Encoder(tmp_path).run(ROWS)
    error = largest(found, full)
    assert 0 < error <= bound
    assert all(
        a["logits"].argmax() == b["logits"].argmax() for a, b in zip(found, full, strict=True)
    )
    small = (tmp_path / "model.onnx").stat().st_size
    assert small < (sample[2] / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=supports("dora", "roberta")) for n in ("roberta", "roberta-bin")]
)
def test_reference_runs_equal_their_recorded_logits(roberta: Built, name: str) -> None:
    entry = next(e for e in INDEX if e["name"] == name)
    expected = load_file(REFERENCE / entry["expected"])
    lengths = expected["attention_mask"].sum(dim=1).tolist()
    rows = [row[:n].tolist() for row, n in zip(expected["input_ids"], lengths, strict=True)]
    found = np.stack([row["logits"] for row in Encoder(roberta[2]).run(rows, name)])
    assert np.abs(found - expected["logits"].numpy()).max() <= BOUND
    assert np.abs(found - expected["base_logits"].numpy()).max() > 1e-2


@supports("dora", "roberta")
def test_adapters_of_the_reference_implementation(roberta: Built) -> None:
    check_adapters(roberta)


@supports("dora", "roberta")
def test_question_answering_with_an_adapter(answers: Built) -> None:
    check_adapters(answers)


@supports("peft_lora", "distilbert")
def test_adapters_with_heads_of_different_size(distilbert: Built) -> None:
    check_adapters(distilbert)
    encoder = Encoder(distilbert[2])
    found = encoder.run(ROWS, ["three", "two", "score", None])
    assert [row["logits"].shape for row in found] == [(3,), (2,), (1,), (3,)]
    assert not found[3]["logits"].any()  # the base has no head


@supports("peft_lora", "deberta-v2")
@pytest.mark.further
def test_rows_of_a_model_with_shared_positions_run_by_adapter(deberta: Built) -> None:
    assert not (deberta[2] / "batched.onnx").exists()
    check_adapters(deberta)


@supports("peft_lora", "bert")
def test_token_classification_with_token_types(tags: Built) -> None:
    base, runs, out = tags
    types = [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in ROWS]
    found = Encoder(out).run(ROWS, types=types)
    assert largest(found, live_rows(runs["merged"], base, ROWS, types=types)) <= BOUND
    assert largest(found, live_rows(runs["merged"], base, ROWS)) > 1e-3
    assert found[0]["logits"].shape == (len(ROWS[0]), 5)


@supports("peft_lora", "bert")
@pytest.mark.further
def test_embeddings(bert_base: Path, tmp_path: Path) -> None:
    more = {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
    path = tiny_lora(bert_base, "BertModel", tmp_path / "lora", None, **more)
    run, base = read_run(path), open_base(bert_base)
    write_onnx(base, tmp_path / "onnx", run=run)
    found = Encoder(tmp_path / "onnx").run(ROWS)
    assert largest(found, live_rows(run, base, ROWS)) <= BOUND
    assert largest(found, live_rows(run, base, ROWS, attached=False)) > 1e-3


def test_plain_onnxruntime_runs_our_files(distilbert: Built) -> None:
    base, runs, out = distilbert
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(out / "model.onnx", quiet)
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(out / "adapters" / "two.onnx_adapter"))
    options.add_active_adapter(adapter)
    row = np.array([ROWS[0]])
    feeds = {"input_ids": row, "attention_mask": np.ones_like(row)}
    (found,) = session.run(None, feeds, options)
    assert np.abs(found - live_rows(runs["two"], base, ROWS[:1])[0]["logits"]).max() <= BOUND


def test_adapters_come_and_go_in_one_session(distilbert: Built) -> None:
    encoder = Encoder(distilbert[2])
    session, before = encoder._session, encoder.run(ROWS, "two")
    file = distilbert[2] / "adapters" / "two.onnx_adapter"
    encoder.remove_adapter("two")
    with pytest.raises(EngineError, match="no such adapter"):
        encoder.run(ROWS, "two")
    encoder.run(ROWS, "three")
    encoder.add_adapter("again", file)
    assert largest(encoder.run(ROWS, "again"), before) == 0
    assert encoder._session is session


def test_both_forms_share_their_weights(roberta: Built) -> None:
    graphs = [
        onnx.load(roberta[2] / name, load_external_data=False).graph
        for name in ("model.onnx", "batched.onnx")
    ]
    outside = [
        {
            t.name: t.external_data[1].value
            for t in g.initializer
            if t.data_location == 1 and "head" not in t.name
        }
        for g in graphs
    ]
    assert outside[0] == outside[1]
    assert len(outside[0]) >= 14


def test_a_damaged_adapter_is_an_error(distilbert: Built, tmp_path: Path) -> None:
    data = bytearray((distilbert[2] / "adapters" / "two.onnx_adapter").read_bytes())
    (tmp_path / "cut.onnx_adapter").write_bytes(data[: len(data) // 3])
    encoder = Encoder(distilbert[2])
    with pytest.raises(TensorFileError, match="not an ONNX Runtime adapter"):
        encoder.add_adapter("cut", tmp_path / "cut.onnx_adapter")


def test_an_adapter_for_another_base_is_an_error(distilbert: Built, roberta: Built) -> None:
    encoder = Encoder(distilbert[2])
    with pytest.raises(EngineError, match="does not fit this graph"):
        encoder.add_adapter("other", roberta[2] / "adapters" / "roberta.onnx_adapter")
    assert "other" not in encoder.adapters


@pytest.mark.parametrize("rows", [[[]], [[7] * 100], [[7] * 63]])
def test_rows_that_do_not_fit(roberta: Built, rows: list[list[int]]) -> None:
    with pytest.raises(EngineError):
        Encoder(roberta[2]).run(rows)


def test_the_engine_refuses_another_task(answers: Built) -> None:
    with pytest.raises(EngineError, match="another task"):
        Encoder(answers[2]).classify(["a"])


def test_bad_exports_leave_nothing(bert_base: Path, tmp_path: Path) -> None:
    base = open_base(bert_base)
    run = reference_runs("roberta")["roberta"]
    calls: list[dict[str, Any]] = [
        {"run": run},
        {"run": run, "precision": "int3"},
        {"adapters": {"a": run}},
    ]
    for call in calls:
        with pytest.raises(DoraExportError):
            write_onnx(base, tmp_path / "out", **call)
    assert not list(tmp_path.iterdir())


def test_adapters_are_added_later(roberta: Built, tmp_path: Path) -> None:
    base, _, out = roberta
    folder = Path(shutil.copytree(out, tmp_path / "onnx"))
    run = reference_runs("roberta-fixed")["roberta-fixed"]
    add_adapters(folder, {"fixed": run}, base)
    found = Encoder(folder).run(ROWS, "fixed")
    assert largest(found, live_rows(run, base, ROWS)) <= BOUND


def test_every_run_is_proven_when_it_is_exported(roberta: Built, sample: Built) -> None:
    base, runs, out = roberta
    proofs = prove(out, base, None, runs)
    assert proofs.keys() == runs.keys() != set()
    for numbers in proofs.values():
        assert numbers["max_abs"] <= BOUND < numbers["control"]
        assert numbers["top1"] == 1
    merged = prove(sample[2], sample[0], sample[1]["merged"], {})["merged"]
    assert merged["max_abs"] <= BOUND < merged["control"]


def test_int4_is_its_own_dequantized_base_and_the_adapters(roberta: Built, tmp_path: Path) -> None:
    base, runs, _ = roberta
    out, name = tmp_path / "onnx", "roberta-bin"
    write_onnx(base, out, adapters=runs, precision="int4")
    found = Encoder(out).run(ROWS, name)
    assert largest(Encoder(out).run(ROWS, [name, None, "roberta", name])[::3], found[::3]) <= MIXED
    exact = Encoder(in_floats(out, tmp_path / "floats")).run(ROWS, name)
    for file in ("model.onnx", "batched.onnx"):
        model = onnx.load(out / file)
        dequantize(model)
        onnx.save(model, out / file)
    full, bare = (Encoder(out).run(ROWS, each) for each in (name, None))
    assert largest(exact, full) <= BOUND
    assert largest(found, full) <= ROUNDED < largest(full, bare) / 10
    assert largest(found, Encoder(roberta[2]).run(ROWS, name)) > BOUND  # the base was rounded


@pytest.mark.further  # the plain run has a decoder's
def test_float16_with_adapters(roberta: Built, tmp_path: Path) -> None:
    base, runs, out = roberta
    write_onnx(base, tmp_path / "onnx", adapters=runs, precision="fp16")
    full, half = Encoder(out), Encoder(tmp_path / "onnx")
    names = [*runs, None]
    assert 0 < largest(half.run(ROWS, names), full.run(ROWS, names)) <= 5e-3
    assert largest(half.run(ROWS, names), full.run(ROWS, names[::-1])) > 5e-2
    for name in names:
        assert largest(half.run(ROWS, name), full.run(ROWS, name)) <= 5e-3


def test_the_engine_needs_no_torch(sample: Built) -> None:
    code = (
        "import sys; from dora_serve.onnxruntime import Encoder; "
        f"Encoder({str(sample[2])!r}).run([[7, 8]]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
