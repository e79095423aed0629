"""Adapters on torch's MultiheadAttention, which PEFT stores as two pairs of one layer: lint's
verdict is what PEFT does with them, and a merge has the outputs of PEFT's live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from converters.targets.lora_folder import WEIGHTS
from dora_serve import merge, read_run, verify
from tests.conftest import randomize
from tests.converters.families import ENCODER, save_adapter
from tests.converters.naming import BOTH, errors
from tests.converters.tied_families import EYES

INNER = ".base_layer.out_proj"
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(5, 14).view(1, -1).expand(2, -1)
# Class → configuration, inputs, and what is adapted.
CLASSES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "SiglipVisionModel": (
        EYES,
        {"pixel_values": PIXELS},
        {"target_modules": ["head.attention", "q_proj"], "rank_pattern": {"head.attention": 2}},
    ),
    "BridgeTowerModel": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vision_config": {**EYES, "hidden_size": 64, "num_hidden_layers": 2},
            "text_config": ENCODER,
        },
        {"input_ids": IDS, "pixel_values": PIXELS},
        {"target_modules": r".*visual.*\.attn"},
    ),
}


def outputs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model.eval()(**inputs).pooler_output)


@pytest.mark.parametrize(
    "name", ["SiglipVisionModel", pytest.param("BridgeTowerModel", marks=pytest.mark.further)]
)
def test_the_two_pairs_of_an_attention(tmp_path: Path, name: str) -> None:
    values, inputs, trained = CLASSES[name]
    cls = getattr(transformers, name)
    base, lora = tmp_path / "base", tmp_path / "lora"
    torch.manual_seed(0)
    model = cls(cls.config_class(**values))
    randomize(model, ("weight",))
    model.save_pretrained(base)
    save_adapter(cls, base, lora, **trained)
    plain = outputs(cls.from_pretrained(base), inputs)
    truth = outputs(PeftModel.from_pretrained(cls.from_pretrained(base), str(lora)), inputs)
    assert float((truth - plain).abs().max()) > 1e-2
    loaded = cls.from_pretrained(base)
    loaded.load_adapter(str(lora))
    assert float((outputs(loaded, inputs) - truth).abs().max()) <= 1e-4
    assert not any(errors(lora, base, engine) for engine in BOTH)
    assert "attention" in errors(lora, base, "vllm")

    run = read_run(lora, ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    merged = cls.from_pretrained(tmp_path / "merged")
    assert float((outputs(merged, inputs) - truth).abs().max()) <= 1e-4
    assert verify(run, tmp_path / "merged", base).passed

    # PEFT computes the rest of the layer without the pair that is lost.
    tensors = load_file(lora / WEIGHTS)
    layers = {key.partition(INNER)[0] for key in tensors if INNER in key}
    halves = [(INNER,), tuple(f"{layer}.lora_" for layer in layers)]
    for lost in halves:
        rest = {k: t for k, t in tensors.items() if not any(part in k for part in lost)}
        assert 0 < len(rest) < len(tensors)
        save_file(rest, lora / WEIGHTS)
        found = PeftModel.from_pretrained(cls.from_pretrained(base), str(lora))
        assert float((outputs(found, inputs) - truth).abs().max()) > 1e-3
        assert all(errors(lora, base, engine) for engine in BOTH)
