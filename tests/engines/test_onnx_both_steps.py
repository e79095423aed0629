"""The decoder of an encoder-decoder as one graph, driven as transformers.js drives it: the same
inputs in every step, empty caches in the first, the encoder's keys and values kept from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from converters.files.onnx_files import DECODER, ENCODER, MERGED, WITH_PAST
from converters.model.base import BaseModel, open_base
from converters.readers import read_run
from converters.run import Run
from converters.targets.onnx import write_onnx
from dora_serve.onnxruntime.beams import Search
from dora_serve.onnxruntime.seq2seq import Seq2Seq
from dora_serve.proof.live import LiveModel
from tests.converters.families import save_adapter, save_base
from tests.engines.test_onnx_seq2seq import ROWS, bart, generated, t5  # noqa: F401

STEPS = 12
# No token twice: untrained models say one thing over and over where they may.
OPTIONS = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1}


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def written(folder: Path, row: list[int], start: int) -> list[int]:
    ids = np.array([row], np.int64)
    mask = np.ones_like(ids)
    encoder, decoder = session(folder / ENCODER), session(folder / MERGED)
    states = encoder.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    feeds: dict[str, Any] = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    for value in decoder.get_inputs():
        if value.name.startswith("past_key_values."):
            size = [each if isinstance(each, int) else 0 for each in value.shape[1:]]
            half = value.type == "tensor(float16)"
            feeds[value.name] = np.zeros((1, *size), np.float16 if half else np.float32)
    names = [value.name for value in decoder.get_outputs()]
    tokens = [start]
    for step in range(STEPS):
        feeds["input_ids"] = np.array([tokens[-1:]], np.int64)
        feeds["use_cache_branch"] = np.array([step > 0])
        told = dict(zip(names, decoder.run(None, feeds), strict=True))
        logits = told.pop("logits")[0, -1]
        logits[tokens] = -np.inf
        tokens.append(int(logits.argmax()))
        given = {name.replace("present", "past_key_values"): v for name, v in told.items()}
        for name in feeds.keys() & given.keys():
            if step and ".encoder." in name:
                assert np.array_equal(feeds[name], given[name])
            feeds[name] = given[name]
    return tokens[1:]


@pytest.mark.further
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_it_writes_what_transformers_writes(request: pytest.FixtureRequest, name: str) -> None:
    base, run, folder = request.getfixturevalue(name)
    live = LiveModel(run, base)
    live.model.generation_config.forced_eos_token_id = None
    live.model.generation_config.eos_token_id = None
    truth = generated(live.model, ROWS, **OPTIONS)
    start = live.model.config.decoder_start_token_id
    assert [written(folder, row, start) for row in ROWS] == truth
    live.detach()
    assert generated(live.model, ROWS, **OPTIONS) != truth  # the control
    sizes = [(folder / name).stat().st_size for name in (DECODER, WITH_PAST, MERGED)]
    assert sizes[2] < 1.2 * (sizes[0] + sizes[1])  # over the same weights


def of_one_layer(folder: Path) -> tuple[BaseModel, Run]:
    cls = save_base("t5", folder / "base", num_layers=1, decoder_start_token_id=0)
    save_adapter(cls, folder / "base", folder / "lora", target_modules=["q", "v", "wo"])
    return open_base(folder / "base"), read_run(folder / "lora")


@pytest.mark.further
def test_the_base_of_many_adapters(tmp_path: Path) -> None:
    """Whoever gives no adapter has the base."""
    base, run = of_one_layer(tmp_path)
    write_onnx(base, tmp_path / "onnx", adapters={"run": run})
    live = LiveModel(run, base)
    live.detach()
    live.model.generation_config.eos_token_id = None
    start = live.model.config.decoder_start_token_id
    found = [written(tmp_path / "onnx", row, start) for row in ROWS]
    assert found == generated(live.model, ROWS, **OPTIONS)


@pytest.mark.parametrize(
    ("precision", "many"),
    [("int8", True), ("int8", False), ("fp16", False)],
)
@pytest.mark.further
def test_a_smaller_precision(tmp_path: Path, precision: str, many: bool) -> None:
    """Its tokens are those of the two graphs by themselves, merged, or the base of adapters."""
    base, run = of_one_layer(tmp_path)
    folder = tmp_path / "onnx"
    what: Any = {"adapters": {"run": run}} if many else {"run": run}
    write_onnx(base, folder, precision=precision, **what)
    model = Seq2Seq(folder, threads=1)
    apart = [
        model.generate([row], Search(STEPS, ignore_eos=True, no_repeat_ngram=1))[0].tokens
        for row in ROWS
    ]
    assert [written(folder, row, model.start) for row in ROWS] == apart
