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
from dora_serve import extract, merge, read_run
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
    plain = GteForSequenceClassification.from_pretrained(base).eval()
    assert float((logits(plain, inputs) - truth).abs().max()) > 100 * BOUND
    fitted = PeftModel.from_pretrained(plain, str(tmp_path / "fitted")).eval()
    assert float((logits(fitted, inputs) - truth).abs().max()) <= BOUND


def test_a_tuned_model_of_joined_layers(tmp_path: Path) -> None:
    """A changed part was no tensor of its own in memory."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    torch.manual_seed(0)
    model = GteForSequenceClassification(GteConfig(**ENCODER)).eval()
    model.save_pretrained(base)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(part in name for part in ("0.self_attn.q_proj", "1.mlp.up_proj")):
                tensor.add_(torch.randn(tensor.shape) * 0.2)
    model.save_pretrained(tuned)
    extract(tuned, tmp_path / "out", base=base, max_rank=48)
    plain = GteForSequenceClassification.from_pretrained(base)
    again = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    kinds = {key.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for key in again.state_dict()}
    assert {"q_proj", "up_proj"} <= kinds and not {"k_proj", "v_proj", "gate_proj"} & kinds
    inputs = verification_batch(again)
    assert float((logits(again, inputs) - logits(model, inputs)).abs().max()) <= BOUND
