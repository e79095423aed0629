"""Bases with layers that predict further tokens: engines use them, transformers loads none. A merge
keeps them as they are, whatever the names of the modules that were adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from tests.conftest import randomize
from tests.converters.families import DECODER, EXPERTS, save_adapter
from tests.converters.naming import logits

TEXT = {**DECODER, "head_dim": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
HEADS = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
KINDS = ["linear_attention", "full_attention"]
COMPRESSED = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
# Family → configuration, what is adapted, and what the layer that predicts is called.
FAMILIES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "Qwen3Next": (
        {**TEXT, **LINEAR, **HEADS, **EXPERTS, "shared_expert_intermediate_size": 16}
        | {"layer_types": KINDS},
        ["q_proj", "in_proj_qkvz", "out_proj"],
        "mtp.layers.0",
    ),
    "DeepseekV3": (
        {**DECODER, **COMPRESSED, **ROUTED, "v_head_dim": 8, "moe_intermediate_size": 24}
        | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
        ["q_b_proj", "o_proj", "down_proj"],
        "model.layers.2",
    ),
    "Glm4Moe": (
        {**TEXT, **ROUTED, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
        ["q_proj", "o_proj"],
        "model.layers.2",
    ),
}


@pytest.mark.parametrize(
    "family",
    [f if f == "Qwen3Next" else pytest.param(f, marks=pytest.mark.further) for f in FAMILIES],
)
def test_layers_that_predict_further_tokens_are_kept(tmp_path: Path, family: str) -> None:
    values, targets, layer = FAMILIES[family]
    cls = getattr(transformers, f"{family}ForCausalLM")
    base, lora = tmp_path / "base", tmp_path / "lora"
    torch.manual_seed(0)
    model = cls(cls.config_class(**values))
    randomize(model, ("proj", "experts"))
    model.save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    first = {n: t for n, t in stored.items() if n.startswith("model.layers.1.")}
    own = {n.replace("model.layers.1", layer): t + 1 for n, t in first.items()}
    own |= {f"{layer}.eh_proj.weight": torch.ones(32, 64), f"{layer}.enorm.weight": torch.ones(32)}
    assert not stored.keys() & own.keys()
    save_file({**stored, **own}, base / "model.safetensors", {"format": "pt"})

    save_adapter(cls, base, lora, target_modules=targets)
    truth = logits(PeftModel.from_pretrained(cls.from_pretrained(base), str(lora)))
    assert float((truth - logits(cls.from_pretrained(base))).abs().max()) > 1e-2
    run = read_run(lora, ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == stored.keys() | own.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in own.items())
    assert float((logits(cls.from_pretrained(tmp_path / "merged")) - truth).abs().max()) <= 1e-4
    write_adapter(run, tmp_path / "adapter", base=base)
    again = PeftModel.from_pretrained(cls.from_pretrained(base), str(tmp_path / "adapter"))
    assert float((logits(again) - truth).abs().max()) <= 1e-4
    assert verify(run, tmp_path / "merged", base).passed
