"""Bases whose files name and join a layer's parts otherwise than their class: adapters name them
as the class does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import NomicBertConfig, NomicBertModel

from converters.model.base import open_base
from converters.targets.onnx import write_onnx
from dora_serve import read_run
from dora_serve.onnxruntime.encoder import STATES, Encoder
from tests.conftest import randomize
from tests.converters.families import ENCODER

ROWS = [[5, 6, 7], [9, 8, 7, 6, 5, 9, 11]]


def test_an_adapter_on_parts_of_a_joined_product(tmp_path: Path) -> None:
    """Nomic's embedder: it was told that the base has no such module."""
    torch.manual_seed(0)
    model = NomicBertModel(NomicBertConfig(**ENCODER), add_pooling_layer=False)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    model.save_pretrained(tmp_path / "base")
    assert any("Wqkv" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    again = NomicBertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    parts = ["q_proj", "v_proj", "o_proj", "down_proj"]
    live = get_peft_model(again, LoraConfig(r=3, lora_alpha=6, target_modules=parts)).eval()
    randomize(live)
    live.save_pretrained(tmp_path / "run")
    runs = {"tuned": read_run(tmp_path / "run")}
    write_onnx(open_base(tmp_path / "base"), tmp_path / "onnx", adapters=runs)
    encoder = Encoder(tmp_path / "onnx")
    for row, tuned, plain in zip(ROWS, encoder.run(ROWS, "tuned"), encoder.run(ROWS), strict=True):
        with torch.no_grad():
            truth = live(input_ids=torch.tensor([row])).last_hidden_state[0].numpy()
        assert np.abs(tuned[STATES] - truth).max() <= 1e-4
        assert np.abs(plain[STATES] - truth).max() > 1e-2
