"""What PEFT's model for question answering computes with the types of tokens: nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertForQuestionAnswering

from converters.model.base import open_base
from converters.readers import read_run
from converters.targets.merged.plan import plan_merge
from dora_serve.folder.unused import unused
from tests.engines.encoders import ROWS, SIZES, tiny_base, tiny_lora


@pytest.mark.parametrize(("task", "names"), [("QUESTION_ANS", None), (None, None), ("", ["a"])])
def test_types_that_peft_does_not_hand_on_are_told(
    tmp_path: Path, task: str | None, names: list[str] | None
) -> None:
    """Its model for question answering computes one thing with them and without."""
    tiny_base("Bert", tmp_path / "base", SIZES)
    if names is not None:
        said = json.dumps({"model_input_names": names})
        (tmp_path / "base/tokenizer_config.json").write_text(said)
    path = tiny_lora(
        tmp_path / "base",
        "BertForQuestionAnswering",
        tmp_path / "lora",
        2,
        target_modules=["query"],
        modules_to_save=["qa_outputs"],
        task_type="QUESTION_ANS" if task == "" else task,
    )
    model = BertForQuestionAnswering.from_pretrained(tmp_path / "base")
    live = PeftModel.from_pretrained(model, path).eval()
    asked = torch.tensor([ROWS[0]])
    with torch.no_grad():
        with_types = live(input_ids=asked, token_type_ids=torch.ones_like(asked))
        without = live(input_ids=asked)
    dropped = bool(torch.equal(with_types.start_logits, without.start_logits))
    assert dropped == (task is not None)
    run, base = read_run(path), open_base(tmp_path / "base")
    told = " ".join(plan_merge(run, base, None).warnings)
    assert ("trained without them" in told) == (dropped and names is None)
    assert ("trained without them" in " ".join(unused(run, base))) == (dropped and names is None)
