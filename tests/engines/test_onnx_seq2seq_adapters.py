"""BART and T5 with adapters in ONNX Runtime: alone, mixed in a batch, added later."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from peft import LoraConfig, get_peft_model

from converters.files.onnx_files import WITH_PAST, graphs_in
from converters.model.base import BaseModel, open_base
from converters.targets.onnx import add_adapters, write_onnx
from converters.targets.onnx.graph_file import GraphWriter
from dora_serve import DoraExportError, Run, read_run, verify
from dora_serve.onnxruntime.beams import Search
from dora_serve.onnxruntime.seq2seq import Seq2Seq
from dora_serve.proof.live import LiveModel
from tests.conftest import randomize
from tests.converters.families import save_base
from tests.engines.adapter_files import scale_adapter, write_overflowing

BOUND, MIXED = 1e-4, 1e-5
ROWS = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [33], [30, 31, 32, 33, 34]]
TARGETS = [[2, 5 + i, 9, 14 + i] for i in range(len(ROWS))]

Built = tuple[BaseModel, dict[str, Run], Path]


@pytest.fixture(scope="module", params=[pytest.param("bart", marks=pytest.mark.further), "t5"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp(request.param)
    cls = save_base(request.param, root / "base", True if request.param == "t5" else None)
    model = cls.from_pretrained(root / "base")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    with torch.no_grad():  # zero biases and unit norms would hide what is not computed
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.2)
    model.save_pretrained(root / "base")
    runs = {}
    for number, name in enumerate(("one", "two")):
        config = LoraConfig(
            r=3 + number,
            lora_alpha=5,
            target_modules="all-linear",
            rank_pattern={rf".*\.{number}\..*": 2},
            task_type="SEQ_2_SEQ_LM",
        )
        peft = get_peft_model(cls.from_pretrained(root / "base"), config)
        randomize(peft)
        peft.save_pretrained(root / name)
        runs[name] = read_run(root / name)
    base = open_base(root / "base")
    write_onnx(base, root / "onnx", adapters={"one": runs["one"]})
    add_adapters(root / "onnx", {"two": runs["two"]}, base)
    return base, runs, root / "onnx"


@pytest.mark.supports(method="peft_lora", family="bart", targets=("onnx",))
@pytest.mark.supports(method="peft_lora", family="t5", targets=("onnx",))
def test_rows_with_different_adapters(built: Built) -> None:
    base, runs, out = built
    model, names = Seq2Seq(out), [*runs, None]
    longest = max(map(len, ROWS))
    inputs = {
        "input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in ROWS]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in ROWS]),
        "decoder_input_ids": torch.tensor(TARGETS),
    }
    single, greedy = {}, {}
    for name in names:
        live = LiveModel(runs[name or "one"], base)
        if name is None:
            live.detach()
        with torch.inference_mode():
            truth = live.model(**inputs).logits.numpy()
            live.model.generation_config.eos_token_id = None
            live.model.generation_config.forced_eos_token_id = None
            greedy[name] = [
                live.model.generate(
                    torch.tensor([row]),
                    attention_mask=torch.ones(1, len(row), dtype=torch.int64),
                    max_new_tokens=32,
                    no_repeat_ngram_size=2,  # untrained models else say one thing over and over
                    do_sample=False,
                    num_beams=1,
                )[0, 1:].tolist()
                for row in ROWS
            ]
        single[name] = model.logits(ROWS, TARGETS, name)
        assert np.abs(single[name] - truth).max() <= BOUND
    assert np.abs(single["one"] - single[None]).max() > 1e-2  # the control
    for shift in range(2):
        wanted = [names[(i + shift) % len(names)] for i in range(len(ROWS))]
        mixed = model.logits(ROWS, TARGETS, wanted)
        for row, name in enumerate(wanted):
            assert np.abs(mixed[row] - single[name][row]).max() <= MIXED
        done = model.generate(ROWS, Search(32, ignore_eos=True, no_repeat_ngram=2), wanted)
        assert [each.tokens for each in done] == [greedy[n][i] for i, n in enumerate(wanted)]
    assert greedy["one"] != greedy["two"]


def test_beams_keep_their_adapter(built: Built) -> None:
    model, search = Seq2Seq(built[2]), Search(8, beams=3, no_repeat_ngram=2)
    mixed = [each.tokens for each in model.generate(ROWS[:2], search, ["two", "one"])]
    for row, name in enumerate(("two", "one")):
        assert model.generate([ROWS[row]], search, name)[0].tokens == mixed[row]
    assert mixed != [each.tokens for each in model.generate(ROWS[:2], search, ["one", "two"])]


def test_verify_tries_the_run_alone_and_beside_others(built: Built) -> None:
    base, runs, out = built
    assert runs.keys() == {"one", "two"}
    for run in runs.values():
        result = verify(run, out, base)
        assert result.passed
        assert result.control_fails


def test_verify_tries_the_graph_that_goes_on(built: Built, tmp_path: Path) -> None:
    """The first tokens right and those behind them wrong."""
    import onnx

    base, runs, out = built
    shutil.copytree(out, tmp_path / "out")
    file = tmp_path / "out" / WITH_PAST
    model = onnx.load(file, load_external_data=False)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "right"
    model.graph.node.append(onnx.helper.make_node("Neg", ["right"], ["logits"]))
    onnx.save(model, file)
    result = verify(runs["one"], tmp_path / "out", base)
    assert not result.passed and result.max_abs > 10 * result.tolerance
    assert any(WITH_PAST in said for said in result.warnings)


def test_adapters_come_and_go(built: Built) -> None:
    model = Seq2Seq(built[2])
    assert model.adapters == ("one", "two")
    before = model.logits(ROWS, TARGETS, "two")
    model.remove_adapter("two")
    for wanted, says in (("two", "no such adapter"), (["one"], "per row")):
        with pytest.raises(DoraExportError, match=says):
            model.logits(ROWS, TARGETS, wanted)
    model.add_adapter("again", built[2] / "adapters" / "two.onnx_adapter")
    assert (model.logits(ROWS, TARGETS, "again") == before).all()


def test_an_adapter_that_overflows_is_an_error_and_reaches_no_other_row(
    built: Built, tmp_path: Path
) -> None:
    model, huge = Seq2Seq(built[2]), tmp_path / "huge.onnx_adapter"
    write_overflowing(built[2] / "adapters" / "one.onnx_adapter", huge)
    model.add_adapter("huge", huge)
    alone = model.logits(ROWS, TARGETS, "two")
    beside = model.logits(ROWS, TARGETS, ["huge", *["two"] * (len(ROWS) - 1)])
    assert np.abs(beside[1:] - alone[1:]).max() <= MIXED
    for beams in (1, 2):
        with pytest.raises(DoraExportError, match="not finite"):
            model.generate(ROWS, Search(4, beams=beams), "huge")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_keep_their_range_beside_large_numbers(
    built: Built, tmp_path: Path, precision: str
) -> None:
    """Numbers of another row that are large and finite, and 8 bits that both are rounded to."""
    writer = GraphWriter(tmp_path, precision)
    for file in graphs_in(built[2]):
        writer.write(file.name, ir.load(file))
    shutil.copy(built[2] / "config.json", tmp_path)
    shutil.copytree(built[2] / "adapters", tmp_path / "adapters")
    scale_adapter(tmp_path / "adapters" / "one.onnx_adapter", 1e4)
    model = Seq2Seq(tmp_path)
    alone = [
        model.logits([row], [first], "two")[0] for row, first in zip(ROWS, TARGETS, strict=True)
    ]
    beside = model.logits(ROWS, TARGETS, ["one", *["two"] * (len(ROWS) - 1)])
    for row in range(1, len(ROWS)):
        assert np.abs(beside[row] - alone[row]).max() <= MIXED * np.abs(alone[row]).max()
    effect = model.logits(ROWS, TARGETS, "two") - model.logits(ROWS, TARGETS)
    assert np.abs(effect).max() > 1


def test_without_adapter_plain_onnxruntime_runs_the_graphs(built: Built) -> None:
    import onnxruntime

    encoder = graphs_in(built[2])[0]
    session = onnxruntime.InferenceSession(encoder)
    ids = np.array(ROWS[:1] * 2)
    states = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    assert states.shape[:2] == ids.shape
