"""Classes and tasks: the table agrees with transformers' own lists, family by family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto import modeling_auto

from converters.errors import BaseError, RunError, TargetError
from converters.model.architecture import class_for
from converters.model.tasks import TASKS, peft_type, task_of, task_of_peft
from dora_serve import ReadOptions, extract, merge, read_run, write_adapter
from dora_serve.proof.verify import logits
from tests.conftest import randomize
from tests.converters.families import DECODER, ENCODER, same

LISTS = {
    "CAUSAL_LM": "causal-lm",
    "SEQUENCE_CLASSIFICATION": "sequence-classification",
    "QUESTION_ANSWERING": "question-answering",
    "TOKEN_CLASSIFICATION": "token-classification",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq-lm",
    "IMAGE_TEXT_TO_TEXT": "causal-lm",
}


def pooled(base: Path) -> None:
    """Make an embedder of a model folder, as sentence-transformers does."""
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling"}
    pooling["type"] = "sentence_transformers.models.Pooling"
    (base / "modules.json").write_text(json.dumps([pooling]))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text("{}")


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


def test_the_class_of_a_run_that_names_no_task(tmp_path: Path) -> None:
    """PEFT, told no task, notes the class: a decoder's run stays one, with its head, on a base that
    is an embedder by itself (Qwen3-Embedding)."""
    base, lora, merged = tmp_path / "base", tmp_path / "lora", tmp_path / "merged"
    model = Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8, tie_word_embeddings=False))
    randomize(model)
    model.save_pretrained(base)
    pooled(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    randomize(adapted, ("lora_",))
    adapted.save_pretrained(lora)
    rows = torch.arange(3, 43).reshape(2, 20)
    ids = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    run, truth = read_run(lora), logits(adapted.eval(), ids)
    merge(run, merged, base=base)
    assert not (merged / "modules.json").exists()
    same(logits(Qwen3ForCausalLM.from_pretrained(merged).eval(), ids), truth)
    write_adapter(run, tmp_path / "adapter", base=base)
    plain = Qwen3ForCausalLM.from_pretrained(base)
    live = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    same(logits(live, ids), truth)


def test_a_run_of_words_filled_in_on_an_embedders_base(tmp_path: Path) -> None:
    """Taken for the embedder's, it would lose its head, and its adapter the names that PEFT finds.
    Without the pooling the base is of the class that was trained."""
    base, lora, plain = tmp_path / "base", tmp_path / "lora", tmp_path / "plain"
    model = BertForMaskedLM(BertConfig(**ENCODER))
    randomize(model)
    model.save_pretrained(plain)
    model.save_pretrained(base)
    pooled(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    randomize(adapted, ("lora_",))
    adapted.save_pretrained(lora)
    with pytest.raises(RunError, match="fills in words") as error:
        read_run(lora, ReadOptions(base=base))
    assert "without modules.json" in str(error.value.remedy)
    merge(read_run(lora, ReadOptions(base=plain)), tmp_path / "merged", base=plain)
    rows = torch.arange(3, 43).reshape(2, 20)
    ids = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    merged = BertForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    same(logits(merged, ids), logits(adapted.eval(), ids))
    with pytest.raises(TargetError, match="no adapter can name") as refused:
        extract(tmp_path / "merged", tmp_path / "out", base=base)
    assert "without modules.json" in str(refused.value.remedy)


def test_an_embedder_that_is_saved_with_a_head_and_without_its_pooler(tmp_path: Path) -> None:
    """A run that names no task is the embedder's, whose pooling layer transformers makes anew."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    filling = BertForMaskedLM(BertConfig(**ENCODER))
    randomize(filling)
    filling.save_pretrained(base)
    pooled(base)
    adapted = get_peft_model(
        BertModel.from_pretrained(base), LoraConfig(r=2, target_modules=["query"])
    )
    randomize(adapted, ("lora_",))
    adapted.save_pretrained(lora)
    merge(read_run(lora, ReadOptions(base=base)), tmp_path / "merged", base=base)
    rows = torch.arange(3, 43).reshape(2, 20)
    merged = BertModel.from_pretrained(tmp_path / "merged").eval()
    same(merged(rows).last_hidden_state, adapted.eval()(rows).last_hidden_state)
