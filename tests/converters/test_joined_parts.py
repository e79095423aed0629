"""Bases whose files join a layer's parts, which the class has as layers of their own: what is read
with or made from such a part's weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PsoftConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import GteConfig, GteForSequenceClassification

from converters.readers import ReadOptions
from dora_serve import merge, read_run
from dora_serve.api import export
from dora_serve.proof.verify import logits, verification_batch
from tests.converters.families import ENCODER

PARTS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
BOUND = 1e-5


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, use_dora=True),
        LoraConfig(r=3, init_lora_weights="pissa"),
        LoraConfig(r=3, init_lora_weights="olora"),
        OFTConfig(oft_block_size=8),
        PsoftConfig(r=4),
        IA3Config(feedforward_modules=["down_proj"]),
    ],
    ids=["dora", "pissa", "olora", "oft", "psoft", "ia3"],
)
def test_parts_of_a_joined_layer(tmp_path: Path, config: PeftConfig) -> None:
    """GTE's embedder: such updates could not be spread over the base's tensors, or the base had no
    such module or no such bias."""
    base, run = tmp_path / "base", tmp_path / "run"
    torch.manual_seed(0)
    config.task_type, config.target_modules = "SEQ_CLS", set(PARTS)
    GteForSequenceClassification(GteConfig(**ENCODER)).save_pretrained(base)
    assert any("qkv_proj" in name for name in load_file(base / "model.safetensors"))
    live = get_peft_model(GteForSequenceClassification.from_pretrained(base), config).eval()
    with torch.no_grad():
        for tensor in live.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn(tensor.shape) * 0.2)
    live.save_pretrained(run)
    inputs = verification_batch(live)
    truth = logits(live, inputs)
    merge(read_run(run, ReadOptions(base=base)), tmp_path / "merged", base=base)
    merged, told = GteForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert float((logits(merged.eval(), inputs) - truth).abs().max()) <= BOUND
    export(run, tmp_path / "fitted", "peft", base=base, max_rank=48)
    plain = GteForSequenceClassification.from_pretrained(base)
    fitted = PeftModel.from_pretrained(plain, str(tmp_path / "fitted")).eval()
    assert float((logits(fitted, inputs) - truth).abs().max()) <= BOUND
