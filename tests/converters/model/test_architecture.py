"""The class that a merged model is loaded in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from converters.errors import BaseError, DoraExportError, TargetError
from converters.model.architecture import class_for, empty_model
from dora_serve import merge, read_run
from tests.conftest import randomize, tiny_llama
from tests.converters import naming
from tests.converters.families import save_base
from tests.converters.made import lazy, low_rank, make_run
from tests.converters.other_trainers import INPUTS
from tests.converters.proving import logits, prove

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def loaded(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder)
    return model, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def test_a_classifier_of_a_language_model(tmp_path: Path) -> None:
    """The head that the run trained joins the body of the base, whose own head goes."""
    save_base("llama", tmp_path / "base", False)
    query = "model.layers.1.self_attn.q_proj"
    update, score = low_rank(32, 32), torch.randn(3, 32)
    run = make_run(
        tmp_path / "run",
        {query: update},
        replaced=lazy(tmp_path / "run", {"score.weight": score}),
        task="sequence-classification",
        num_labels=3,
    )
    merge(run, tmp_path / "out", base=tmp_path / "base")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 3
    found, own = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "base" / WEIGHTS)
    assert found.keys() == own.keys() - {"lm_head.weight"} | {"score.weight"}
    assert torch.equal(found["score.weight"], score)
    model, _ = loaded(tmp_path / "out")
    weight = model.get_submodule(query).weight
    assert torch.allclose(weight, own[f"{query}.weight"] + update.dense(), atol=1e-5)
    missing = make_run(
        tmp_path / "run2", {query: update}, task="sequence-classification", num_labels=3
    )
    with pytest.raises(BaseError, match="neither the base nor the run") as caught:
        merge(missing, tmp_path / "no", base=tmp_path / "base")
    assert caught.value.tensor == "score.weight"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"architectures": []}, TargetError, "no class"),
        ({"architectures": None}, TargetError, "no class"),
        ({"architectures": ["NothingForCausalLM"]}, TargetError, "no class"),
        ({"num_hidden_layers": 2001}, BaseError, "over 2000"),
        ({"num_hidden_layers": "two"}, BaseError, "cannot make"),
        ({"model_type": "nothing"}, BaseError, "cannot make"),
        ({"text_config": {"n_layer": 5000}}, BaseError, "n_layer is 5000"),
        ({"num_experts": 2001}, BaseError, "num_experts is 2001"),
    ],
    ids=str,
)
def test_configurations_of_no_classifier(
    tmp_path: Path, change: dict[str, object], error: type[DoraExportError], says: str
) -> None:
    save_base("llama", tmp_path / "base", False)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    run = make_run(
        tmp_path / "run",
        {"model.layers.1.self_attn.q_proj": low_rank(32, 32)},
        replaced=lazy(tmp_path / "run", {"score.weight": torch.randn(3, 32)}),
        task="sequence-classification",
        num_labels=3,
    )
    with pytest.raises(error, match=says):
        merge(run, tmp_path / "out", base=tmp_path / "base")


def test_labels_without_end(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base", False)
    run = make_run(
        tmp_path / "run",
        {"model.layers.1.self_attn.q_proj": low_rank(32, 32)},
        task="sequence-classification",
        num_labels=1_000_001,
    )
    with pytest.raises(BaseError, match="num_labels is 1000001"):
        merge(run, tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize(
    ("current", "ending", "found"),
    [
        ("LlamaForCausalLM", "ForSequenceClassification", "LlamaForSequenceClassification"),
        ("LlamaModel", "ForCausalLM", "LlamaForCausalLM"),
        ("GPT2LMHeadModel", "ForTokenClassification", "GPT2ForTokenClassification"),
        ("BertPreTrainedModel", "Model", "BertModel"),
        ("BertForPreTraining", "ForMaskedLM", "BertForMaskedLM"),
        ("MarianMTModel", "ForCausalLM", "MarianForCausalLM"),
        ("Qwen2VLForConditionalGeneration", "Model", "Qwen2VLModel"),
    ],
)
def test_the_class_of_a_family_for_a_task(current: str, ending: str, found: str) -> None:
    assert class_for({"architectures": [current]}, ending) == found


def test_families_without_a_class_for_a_task() -> None:
    for config in ({}, {"architectures": ["ForCausalLM"]}, {"architectures": ["LlamaForNothing"]}):
        with pytest.raises(TargetError, match="no class for this task") as caught:
            class_for({"model_type": "llama", **config}, "ForNothing")
        assert "model_type: llama" in str(caught.value.found)


def tiny(**more: object) -> dict[str, object]:
    return {**tiny_llama().config.to_dict(), **more}


def test_a_model_without_weights() -> None:
    model = empty_model("LlamaForCausalLM", tiny())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.lm_head.weight.shape == (80, 32)
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    for count, found in ((None, 3), (3, 3), (5, 5)):
        model = empty_model("LlamaForSequenceClassification", tiny(**labels), count)
        assert model.score.weight.shape == (found, 32)
        assert len(model.config.id2label) == len(model.config.label2id) == found
    both = naming.FAMILIES["gemma3"].config().to_dict()
    assert empty_model("Gemma3ForCausalLM", both).config.model_type == "gemma3_text"
    assert empty_model("Gemma3ForConditionalGeneration", both).config.model_type == "gemma3"


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("key", ["n_layer", "n_layers", "odd_layers", "experts", "n_odd_experts"])
def test_how_many_parts_a_configuration_may_ask_for(key: str, inside: bool) -> None:
    """Of what no class reads, so that none is made; told before any is."""
    for count in (2000, 2001):
        config = tiny(odd={key: count}) if inside else tiny(**{key: count})
        if count == 2000:
            empty_model("LlamaForCausalLM", config)
        else:
            with pytest.raises(BaseError, match="cannot make") as caught:
                empty_model("LlamaForCausalLM", config)
            assert f"{key} is 2001, over 2000" in str(caught.value.found)
    empty_model("LlamaForCausalLM", tiny(**{f"{key}_x": 5000, "odd": [5000]}))


@pytest.mark.supports(method="peft_lora", family="mamba2", targets=("merged", "peft"))
def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    """transformers writes Mamba-2's `time_step_limit` as {"__float__": "Infinity"}."""
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4}
    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=80, expand=2, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    Mamba2ForCausalLM(config).save_pretrained(tmp_path / "base")
    stored = json.loads((tmp_path / "base" / "config.json").read_text())
    assert {"__float__": "Infinity"} in stored["time_step_limit"]
    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=3, target_modules=["in_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora)
    control = logits(wrapped, INPUTS)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run")
    truth = logits(wrapped, INPUTS)
    prove(run, tmp_path / "base", INPUTS, truth, control, tmp_path, ("peft",))
