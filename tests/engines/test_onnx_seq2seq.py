"""BART and T5 in ONNX Runtime against the live runs and transformers' `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from converters.errors import DoraExportError
from converters.model.base import BaseModel, open_base
from converters.readers import read_run
from converters.run import Run
from converters.targets.onnx import write_onnx
from dora_serve.onnxruntime import seq2seq_queue
from dora_serve.onnxruntime.beams import Search
from dora_serve.onnxruntime.request import Delta
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.onnxruntime.seq2seq import Batch, Seq2Seq
from dora_serve.onnxruntime.session import EngineError
from dora_serve.proof.live import LiveModel
from dora_serve.proof.onnxruntime import prove
from tests.conftest import DATA, MODELS, made_once, randomize
from tests.engines.test_onnx_large import check as weights_lie_outside
from tests.engines.test_onnx_large import everything_is_large

BOUND = 1e-4
REFERENCE = DATA / "reference"
INDEX: list[dict[str, Any]] = json.loads((REFERENCE / "index.json").read_text())
ROWS = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [33], [30, 31, 32, 33, 34]]
STEPS = 32
# The plain run has BART merged, and T5 with adapters in test_onnx_seq2seq_adapters.py. The run that
# is unfinished is read from another checkpoint, and is then the same.
FURTHER = pytest.mark.further

Built = tuple[BaseModel, Run, Path]


def reference(name: str, factory: pytest.TempPathFactory) -> Built:
    entry = next(e for e in INDEX if e["name"] == name)
    base, run = open_base(REFERENCE / entry["base"]), read_run(REFERENCE / entry["checkpoint"])
    made = made_once(factory, f"{name}-onnx", lambda out: write_onnx(base, out, run=run))
    return base, run, made


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """With weights that no fusion sees, as those of large models."""
    with pytest.MonkeyPatch.context() as patch:
        everything_is_large(patch)
        return reference("bart", tmp_path_factory)


@pytest.fixture(scope="session")
def bart_unfinished(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return reference("bart-unfinished", tmp_path_factory)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=80,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():  # else every greedy token is the same
        model.shared.weight.mul_(3)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q", "v", "wi_0", "wo"],
        rank_pattern={"q": 2},
        task_type="SEQ_2_SEQ_LM",
    )
    adapted = get_peft_model(model, lora)
    randomize(adapted)
    adapted.save_pretrained(folder / "lora")
    base, run = open_base(folder / "base"), read_run(folder / "lora")
    write_onnx(base, folder / "onnx", run=run)
    return base, run, folder / "onnx"


def generated(model: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
    """What transformers writes for each row alone, the decoder's first token left out."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(output[0, 1:].tolist())
    return found


def check(built: Built) -> None:
    base, run, out = built
    model, live = Seq2Seq(out, threads=1), LiveModel(run, base)
    targets = [[2, 5 + i, 9, 14 + i] for i in range(len(ROWS))]
    longest = max(map(len, ROWS))
    pad = live.model.config.pad_token_id
    inputs = {
        "input_ids": torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ROWS]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in ROWS]),
        "decoder_input_ids": torch.tensor(targets),
    }
    with torch.inference_mode():
        truth = live.model(**inputs).logits.numpy()
    found = model.logits(ROWS, targets)
    assert np.abs(found - truth).max() <= BOUND
    assert (found.argmax(-1) == truth.argmax(-1)).all()

    live.model.generation_config.forced_eos_token_id = None
    live.model.generation_config.eos_token_id = None
    for size in (0, 2):  # untrained models say one thing over and over where they may
        search = Search(STEPS, ignore_eos=True, no_repeat_ngram=size)
        greedy = [done.tokens for done in model.generate(ROWS, search)]
        options = {"max_new_tokens": STEPS, "no_repeat_ngram_size": size}
        assert greedy == generated(live.model, ROWS, do_sample=False, num_beams=1, **options)
    assert len({token for row in greedy for token in row}) > 5

    live.detach()
    with torch.inference_mode():
        without = live.model(**inputs).logits.numpy()
    assert np.abs(found - without).max() > 1e-2  # the control


@pytest.mark.supports(method="dora", family="bart", targets=("onnx",))
@pytest.mark.parametrize("name", ["bart", pytest.param("bart_unfinished", marks=FURTHER)])
def test_bart_runs_equal_the_live_model(request: pytest.FixtureRequest, name: str) -> None:
    check(request.getfixturevalue(name))


@pytest.mark.further
@pytest.mark.supports(method="peft_lora", family="t5", targets=("onnx",))
def test_t5_equals_the_live_model(t5: Built) -> None:
    check(t5)


@pytest.mark.parametrize("name", ["bart", pytest.param("bart-unfinished", marks=FURTHER)])
def test_bart_equals_the_reference_implementations_logits(
    request: pytest.FixtureRequest, name: str
) -> None:
    out = request.getfixturevalue(name.replace("-", "_"))[2]
    entry = next(e for e in INDEX if e["name"] == name)
    expected = load_file(REFERENCE / entry["expected"])
    mask = expected["attention_mask"]
    rows = [r[m.bool()].tolist() for r, m in zip(expected["input_ids"], mask, strict=True)]
    found = Seq2Seq(out).logits(rows, expected["decoder_input_ids"].tolist())
    assert np.abs(found - expected["logits"].numpy()).max() <= BOUND
    assert np.abs(found - expected["base_logits"].numpy()).max() > 1e-2


@pytest.mark.parametrize(
    "search",
    [
        Search(12, beams=3),
        Search(12, beams=4, length_penalty=2.0, early_stopping=True, min_tokens=3),
        Search(12, beams=2, length_penalty=0.5, no_repeat_ngram=2),
        Search(12),
    ],
    ids=["plain", "early", "ngram", "greedy"],
)
@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=FURTHER)])
def test_search_is_that_of_transformers(
    request: pytest.FixtureRequest, family: str, search: Search
) -> None:
    base, run, out = request.getfixturevalue(family)
    live = LiveModel(run, base).model
    wanted = generated(
        live,
        ROWS,
        max_new_tokens=search.max_tokens,
        num_beams=search.beams,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        min_new_tokens=search.min_tokens or None,
        no_repeat_ngram_size=search.no_repeat_ngram,
        do_sample=False,
    )
    model = Seq2Seq(out)
    found = [done.tokens for done in model.generate(ROWS, search)]
    ends = model.eos
    assert found == [[t for t in row if t not in ends] for row in wanted]


def test_the_generation_configuration_alone_names_rules(bart: Built, tmp_path: Path) -> None:
    """And not a BART's own one, which names a forced end in any case; what an answer may not begin
    with does not follow what it is forced to begin with."""
    base, run, out = bart
    folder = shutil.copytree(out, tmp_path / "onnx")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "forced_eos_token_id": 2}))
    live = LiveModel(run, base).model
    said: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 6, "min_new_tokens": 6}
    said |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_bos_token_id": 9}

    def both() -> tuple[list[list[int]], list[list[int]]]:
        (folder / "generation_config.json").write_text(json.dumps(said))
        live.generation_config = GenerationConfig(**said)
        found = [done.tokens for done in Seq2Seq(folder).generate(ROWS)]
        return found, [[t for t in row if t != 2] for row in generated(live, ROWS)]

    found, truth = both()
    assert found == truth and all(len(row) == 6 for row in truth)
    said["begin_suppress_tokens"] = [row[1] for row in truth]
    behind, truth = both()
    assert behind == truth != found


def test_the_run_is_proven_when_it_is_exported(bart: Built) -> None:
    base, run, out = bart
    numbers = prove(out, base, run, {})["merged"]
    assert numbers["max_abs"] <= BOUND < numbers["control"]


def test_the_graphs_share_their_weights(bart: Built) -> None:
    files = {path.name: path.stat().st_size for path in bart[2].iterdir()}
    whole = sum(p.stat().st_size for p in bart[0].path.glob("*.safetensors"))
    assert files["model.onnx.data"] < 1.3 * whole
    weights_lie_outside(bart[2])


@pytest.mark.parametrize("rows", [[], [[]], [[7] * 1000]])
def test_prompts_that_do_not_fit(bart: Built, rows: list[list[int]]) -> None:
    with pytest.raises(EngineError, match="empty or too long"):
        Seq2Seq(bart[2]).generate(rows)


def test_a_folder_without_graphs(tmp_path: Path) -> None:
    with pytest.raises(DoraExportError, match="no ONNX graph"):
        Seq2Seq(tmp_path)


def test_what_a_decoder_begins_with_has_few_logits_at_once(
    bart: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beams do, of which each goes on: each token had a vocabulary of logits, 1.5 GB of 128
    beams of ten tokens where that has 250,000. The answers are the same."""
    folder = tmp_path / "onnx"
    shutil.copytree(bart[2], folder)
    shutil.copy(MODELS / "tiny-llama-base" / "tokenizer.json", folder)
    model, begun = Seq2Seq(folder, threads=1), list[int]()
    real = Batch.begin

    def begin(batch: Batch, tokens: Any) -> Any:
        begun.append(tokens.size)
        return real(batch, tokens)

    monkeypatch.setattr(Batch, "begin", begin)
    queue = seq2seq_queue.Seq2SeqQueue(model)
    draws = [Sampling(max_tokens=4, logprobs=3, ignore_eos=True)] * 3

    def answers(most: int) -> list[Delta]:
        monkeypatch.setattr(seq2seq_queue, "_LOGITS", most * model.vocabulary)
        told: list[SimpleQueue[Delta]] = [SimpleQueue() for _ in draws]
        queue.submit(ROWS[0], None, draws, [each.put for each in told], [5, 6, 7, 8, 9])
        return [each.get(timeout=60) for each in told for _ in range(4)]

    whole, apart, single = (answers(most) for most in (100, 6, 1))
    assert begun == [18, 6, 3]
    for found in (apart, single):
        assert [each.tokens for each in found] == [each.tokens for each in whole]
        values = [[*each.logprobs[0][1].values()] for each in found]
        truth = [[*each.logprobs[0][1].values()] for each in whole]
        assert np.abs(np.array(values) - truth).max() <= BOUND
    queue.close()
