"""Names in ONNX Runtime: whatever a run calls its modules, its adapter beside a graph computes what
was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.model.base import open_base
from converters.readers import ReadOptions
from converters.targets.onnx import write_onnx
from dora_serve import read_run
from dora_serve.onnxruntime.model import open_onnx
from tests.converters.naming import BOUND, FAMILIES, INPUTS, in_peft, load, logits, make, renamed
from tests.converters.test_naming import AS_IT_LIES, FORMS

QUICK = {"qwen2"}
READ = (
    *("qwen2", "llama", "mistral", "qwen3", "gemma3, decoder", "gpt2"),
    *("bert", "roberta", "bart", "t5"),
)


def marks(family: str) -> list[pytest.MarkDecorator]:
    rows = [
        pytest.mark.named(family=family, form=form, computes=("onnx",), asked=("onnx",))
        for form in AS_IT_LIES[family]
    ]
    return rows if family in QUICK else [*rows, pytest.mark.further]


@pytest.mark.parametrize("family", [pytest.param(name, marks=marks(name)) for name in READ])
def test_every_form_beside_one_graph(tmp_path: Path, family: str) -> None:
    make(tmp_path, FAMILIES[family])
    base, clean = tmp_path / "base", tmp_path / "lora"
    truth = in_peft(family, base, clean)
    plain = logits(load(FAMILIES[family], base))
    assert float((truth - plain).abs().max()) > 100 * BOUND
    runs = {}
    for number, form in enumerate(AS_IT_LIES[family]):
        lora = renamed(clean, tmp_path / f"form-{number}", FORMS[form])
        runs[lora.name] = read_run(lora, ReadOptions(base=base))
    write_onnx(open_base(base), tmp_path / "onnx", adapters=runs)
    model = open_onnx(tmp_path / "onnx")
    inputs = {**INPUTS, "attention_mask": torch.ones_like(INPUTS["input_ids"])}
    if family in ("bart", "t5"):
        inputs["decoder_input_ids"] = INPUTS["input_ids"][:, :5]
    errors = {}
    for name in runs:
        model.adapters = name
        errors[name] = float((model(**inputs).logits - truth).abs().max())
    assert errors.keys() == runs.keys() and max(errors.values()) <= BOUND
    model.adapters = None
    assert float((model(**inputs).logits - plain).abs().max()) <= BOUND
