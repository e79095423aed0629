"""Models of states beside attention (Mamba's kin), whose configurations hold numbers that JSON has
not: merged and as adapters, against PEFT's live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from converters.errors import TargetError
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from tests.conftest import randomize

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STATES = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
NEMOTRON = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
FEED = ["in_proj", "q_proj", "down_proj"]
# Name → class, configuration, what is adapted, whether it holds numbers that JSON has not.
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], bool]] = {
    "nemotron-h": (
        "NemotronH",
        {**NEMOTRON, "layers_block_type": ["mamba", "attention", "mlp", "mamba"]},
        [*FEED, "o_proj"],
        True,
    ),
    "nemotron-h, experts": (
        "NemotronH",
        {**NEMOTRON, **EXPERTS, "layers_block_type": ["mamba", "moe", "attention", "moe"]},
        [*FEED, "up_proj"],
        True,
    ),
    "bamba": (
        "Bamba",
        {**STATES, "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_groups": 1},
        FEED,
        True,
    ),
    "falcon-h1": (
        "FalconH1",
        {
            **STATES,
            "num_hidden_layers": 2,
            "mamba_n_groups": 1,
            "mamba_d_ssm": 64,
            "head_dim": 8,
        },
        FEED,
        True,
    ),
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        ["in_proj", "x_proj", "q_proj"],
        False,
    ),
}
VLLM_LACKS = {"bamba"}  # since 0.23


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.supports(
                method="peft_lora",
                family=name,
                targets=("merged", "peft") if name in VLLM_LACKS else ("merged", "peft", "vllm"),
            ),
        )
        for name in FAMILIES
    ],
)
def test_merged_and_as_an_adapter(name: str, tmp_path: Path) -> None:
    kind, more, targets, infinite = FAMILIES[name]
    cls = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    model = cls(cls.config_class(**SIZES, **more))
    with torch.no_grad():  # zero biases and unit norms would hide what is not computed
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.05)
    base, folder = tmp_path / "base", tmp_path / "run"
    model.save_pretrained(base)
    assert ("__float__" in (base / "config.json").read_text()) is infinite
    told = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    randomize(peft := get_peft_model(cls.from_pretrained(base), told))
    peft.save_pretrained(folder)
    run = read_run(folder, ReadOptions(base=base))
    assert {module.rpartition(".")[2] for module in run.updates} == set(targets)
    merge(run, tmp_path / "merged", base=base)
    right = verify(run, tmp_path / "merged", base)
    assert right.passed and right.truth == "peft", right
    if name in VLLM_LACKS:
        with pytest.raises(TargetError, match="does not adapt these modules"):
            write_adapter(run, tmp_path / "vllm", base=base, target="vllm")
    for target in ("peft",) if name in VLLM_LACKS else ("peft", "vllm"):
        write_adapter(run, tmp_path / target, base=base, target=target)
        found = verify(run, tmp_path / target, base, "peft", earlier=right)
        assert found.passed, found
    # The control: the base itself, which is the merge without the update.
    wrong = verify(run, base, base, earlier=right)
    assert not wrong.passed and wrong.max_abs > 10 * wrong.tolerance
