"""Names of modules and tensors, with all that others put into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from converters.errors import BaseError
from converters.model.base import open_base
from converters.model.names import (
    Names,
    adapter_in,
    as_peft_loads,
    unwrapped,
    without_adapter,
)
from converters.model.tasks import auto_class
from tests.conftest import tiny_llama
from tests.converters import naming

PLAIN = "model.layers.0.self_attn.q_proj.weight"
WRAPPERS = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_wraps_a_module_is_no_part_of_its_name(wrapper: str, llama_base: Path) -> None:
    names = Names(open_base(llama_base), "LlamaForCausalLM")
    for name in (
        f"{wrapper}.{PLAIN}",
        f"base_model.model.{wrapper}.{PLAIN}",
        f"base_model.model.base_model.model.{PLAIN}",
        PLAIN.replace("self_attn", f"{wrapper}.self_attn"),
    ):
        assert unwrapped(name) == PLAIN
    assert unwrapped(PLAIN) == PLAIN
    assert unwrapped(f"my{wrapper}.weight") == f"my{wrapper}.weight"
    assert names.tensor(PLAIN) == PLAIN
    assert names.tensor("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_E", "lora_magnitude_vector"])
def test_the_name_of_an_adapter_inside_a_name(part: str) -> None:
    assert adapter_in(f"m.q.{part}.default.weight") == "default"
    assert without_adapter(f"m.q.{part}.default.weight") == f"m.q.{part}.weight"
    assert adapter_in(f"m.q.{part}.my-name.bias") == "my-name"
    assert adapter_in(f"m.q.{part}.default") == "default"
    for name in (f"m.q.{part}.weight", f"m.q.{part}.bias", f"m.q.{part}", "m.q.lora.default"):
        assert adapter_in(name) is None
        assert without_adapter(name) == name


def test_the_names_of_a_class(llama_base: Path) -> None:
    names = Names(open_base(llama_base), "LlamaForCausalLM")
    assert names.state["lm_head.weight"] == (80, 32)
    assert names.has("lm_head") and names.has("lm_head.weight") and not names.has("model")
    for said, meant in (
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.mlp.up_proj[3]", "model.layers.1.mlp.up_proj[3]"),
        ("layers.9.mlp.up_proj", None),
        ("nothing", None),
    ):
        assert names.module(said) == meant
    for architecture in (None, "NothingForCausalLM"):
        unknown = Names(open_base(llama_base), architecture)
        assert (unknown.model, unknown.state) == (None, {})
        assert unknown.tensor(PLAIN) is None and unknown.module("lm_head") is None


def test_a_configuration_that_makes_no_model(llama_base: Path) -> None:
    base = open_base(llama_base)
    base.config["num_hidden_layers"] = "two"  # type: ignore[index]
    with pytest.raises(BaseError, match="cannot make"):
        _ = Names(base, "LlamaForCausalLM").model
    base.config["model_type"] = "nothing-known"  # type: ignore[index]
    assert Names(base, "LlamaForCausalLM").model is None


def test_what_peft_takes_old_names_for(tmp_path: Path) -> None:
    naming.make(tmp_path, naming.FAMILIES["llava"])
    names = Names(open_base(tmp_path / "base"), "LlavaForConditionalGeneration")
    old = "language_model.model.layers.0.self_attn.q_proj"
    now = "model.language_model.layers.0.self_attn.q_proj"
    stored = {
        f"base_model.model.{old}.lora_A.weight": "one",
        f"base_model.model.{old}.lora_B.weight": "one",
        f"base_model.model.{now.replace('q_proj', 'v_proj')}.lora_A.weight": "two",
        "base_model.model.nothing.lora_A.weight": "three",
        "nothing.lora_A.weight": "four",
    }
    found = as_peft_loads(names, stored)
    assert found == {"one": now, "two": now.replace("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("task", "found"),
    [
        (None, "LlamaForCausalLM"),
        ("causal-lm", "LlamaForCausalLM"),
        ("sequence-classification", "LlamaForSequenceClassification"),
        ("token-classification", "LlamaForTokenClassification"),
        ("question-answering", "LlamaForQuestionAnswering"),
        ("feature-extraction", "LlamaModel"),
        ("seq2seq-lm", None),
    ],
)
def test_the_class_that_auto_model_takes(task: str | None, found: str | None) -> None:
    assert auto_class({"model_type": "llama"}, task) == found
    assert auto_class({"model_type": "nothing"}, task) is None
    assert auto_class({}, task) is None


def test_names_of_a_live_model_lead_back(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    names = Names(open_base(tmp_path / "base"), "LlamaForCausalLM")
    live = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    keys = [key for key in live.state_dict() if ".base_layer." not in key and "lora_" not in key]
    assert len(keys) == len(names.state) - 2
    assert {names.tensor(unwrapped(key)) for key in keys} <= names.state.keys()


def test_a_module_that_is_called_as_a_wrapper_is(llama_base: Path) -> None:
    names = Names(open_base(llama_base), "LlamaForCausalLM")
    assert names.model is not None
    vars(names)["state"] = {"tower.module.proj.weight": (2, 2), "head.weight": (2, 2)}
    assert names.tensor("tower.proj.weight") == "tower.module.proj.weight"
    assert names.module("tower.module.proj") == "tower.module.proj"
    assert names.tensor("tower.head.weight") is None
