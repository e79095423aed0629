"""Adapters on the biases of fused experts, `[expert, out]`, alone and beside the experts' weights:
PEFT nests one pair for each parameter, in the order in which the module registers them."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM

from converters.errors import RunError
from converters.model.layout import REGISTERED
from converters.readers import ReadOptions
from dora_serve import read_run
from tests.conftest import randomize
from tests.converters.families import DECODER, prove, save_adapter
from tests.converters.naming import BOTH, errors

FURTHER = [("down_proj_bias",), ("gate_up_proj_bias", "down_proj"), REGISTERED]
NAMES = [
    ("gate_up_proj", "down_proj_bias"),
    *(pytest.param(names, marks=pytest.mark.further) for names in FURTHER),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    values = {**DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**values))
    randomize(model, ("experts",))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_biases_of_experts(base: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    parameters = [f"mlp.experts.{name}" for name in names]
    ranks = {"mlp.experts.down_proj_bias": 2}
    lora = tmp_path / "lora"
    save_adapter(
        GptOssForCausalLM, base, lora, target_parameters=parameters, rank_pattern=ranks,
        target_modules=["q_proj"],
    )  # fmt: skip
    for engine in BOTH:
        assert not errors(lora, base, engine)
    prove(GptOssForCausalLM, base, lora, tmp_path)
    assert not errors(tmp_path / "adapter", base, "peft")


def test_other_parameters_of_one_module_are_left_to_peft(base: Path, tmp_path: Path) -> None:
    """Whose order in the module is not known."""
    model = GptOssForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        layer.mlp.experts.register_parameter("scale", layer.mlp.experts.down_proj_bias)
    names = ["mlp.experts.scale", "mlp.experts.gate_up_proj"]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    randomize(tuned)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(RunError, match="cannot be told") as error:
        read_run(tmp_path, ReadOptions(base=base))
    assert "PEFT" in str(error.value.remedy)
