"""Classes and tasks: the table agrees with transformers' own lists, family by family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, LlamaForCausalLM
from transformers.models.auto import modeling_auto

from converters.errors import BaseError
from converters.model.architecture import class_for
from converters.model.tasks import TASKS, peft_type, task_of, task_of_peft
from dora_serve import merge, read_run
from tests.conftest import randomize

LISTS = {
    "CAUSAL_LM": "causal-lm",
    "SEQUENCE_CLASSIFICATION": "sequence-classification",
    "QUESTION_ANSWERING": "question-answering",
    "TOKEN_CLASSIFICATION": "token-classification",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq-lm",
    "IMAGE_TEXT_TO_TEXT": "causal-lm",
}


def listed(name: str) -> dict[str, str]:
    known = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
    return {kind: cls for kind, cls in known.items() if kind in CONFIG_MAPPING}


@pytest.mark.parametrize("name", LISTS)
def test_every_class_that_transformers_lists(name: str) -> None:
    """An encoder that reads text, or sees, makes a model seq2seq, whatever list it is in."""
    found, checked = {}, 0
    for kind, cls in listed(name).items():
        made_of_others = "encoder-decoder" in kind or kind.startswith("musicgen")
        if made_of_others or kind.endswith("_assistant"):  # with no configuration of its own
            continue
        config = CONFIG_MAPPING[kind]()
        expected = LISTS[name]
        if expected in ("causal-lm", "seq2seq-lm") and cls.endswith("ForConditionalGeneration"):
            expected = "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
        checked += 1
        told = task_of({**config.to_diff_dict(), "architectures": [cls]})
        if told != expected:
            found[cls] = told
    assert checked > 15
    assert not found


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["MarianMTModel"]}, "seq2seq-lm"),
        ({"architectures": ["FSMTModel"]}, "feature-extraction"),
        ({"architectures": ["GPT2LMHeadModel"]}, "causal-lm"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, None),
        ({"architectures": ["BertForMaskedLM"]}, None),
        ({"architectures": ["BertModel"]}, "feature-extraction"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "seq2seq-lm"),
        ({"architectures": ["XForConditionalGeneration"], "vision_config": {}}, "causal-lm"),
        (
            {
                "architectures": ["XForConditionalGeneration"],
                "vision_config": {},
                "is_encoder_decoder": True,
            },
            "seq2seq-lm",
        ),
        ({"architectures": ["XForConditionalGeneration"], "rope_scaling": {"x": 1}}, "seq2seq-lm"),
        ({"architectures": ["XForConditionalGeneration"], "text_config": None}, "seq2seq-lm"),
        ({"architectures": ["ReformerModelWithLMHead"]}, "causal-lm"),
        ({"architectures": ["IdeficsForVisionText2Text"]}, "causal-lm"),
        ({"architectures": ["XLNetForQuestionAnsweringSimple"]}, "question-answering"),
        ({"architectures": ["SeamlessM4TForTextToText"]}, "seq2seq-lm"),
        ({"architectures": ["SpeechT5ForSpeechToText"]}, "seq2seq-lm"),
        ({"architectures": ["NothingForVision2Seq"]}, None),
        ({"architectures": []}, None),
        ({}, None),
    ],
)
def test_names_that_mislead(config: dict[str, object], task: str | None) -> None:
    assert task_of(config) == task


def test_the_same_family_for_another_task() -> None:
    config = {"architectures": ["MarianMTModel"], "model_type": "marian"}
    assert class_for(config, "ForCausalLM") == "MarianForCausalLM"


def test_peft_names_every_task_once() -> None:
    from peft import TaskType

    assert {task_of_peft(kind.value) for kind in TaskType} == set(TASKS)
    assert [task_of_peft(peft_type(task)) for task in TASKS] == list(TASKS)
    assert task_of_peft(None) is None


@pytest.mark.parametrize(
    "trained",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_a_head_that_the_task_has_not(
    trained: dict[str, Any], llama_base: Path, tmp_path: Path
) -> None:
    """The class of the task that is said has no place for what the other's training left."""
    model = LlamaForCausalLM.from_pretrained(llama_base)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **trained))
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "run")
    merge(read_run(tmp_path / "run"), tmp_path / "right", base=llama_base)
    file = tmp_path / "run" / "adapter_config.json"
    said = {**json.loads(file.read_text()), "task_type": "FEATURE_EXTRACTION"}
    file.write_text(json.dumps(said))
    with pytest.raises(BaseError, match="said to be for") as error:
        merge(read_run(tmp_path / "run"), tmp_path / "out", base=llama_base)
    assert error.value.tensor == "lm_head.weight" and "task_type" in str(error.value.remedy)
    assert not (tmp_path / "out").exists()
