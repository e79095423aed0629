"""A graph in float16 of a model whose attention knows distances by buckets: a rounded distance
would be in the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import T5Config, T5EncoderModel

from dora_serve import write_onnx


def test_buckets_are_those_of_the_live_model(tmp_path: Path) -> None:
    config = T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1)
    torch.manual_seed(0)
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative" in name:
                parameter.copy_(torch.randn(parameter.shape) * 3)
    model.save_pretrained(tmp_path / "base")
    write_onnx(tmp_path / "base", tmp_path / "onnx", precision="fp16")
    session: Any = onnxruntime.InferenceSession(
        tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for length in (4, 20, 80, 140):
        ids = torch.randint(3, 80, (1, length))
        with torch.no_grad():
            truth = model(ids)[0]
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
        found = torch.tensor(session.run(None, feeds)[0])
        assert (found - truth).norm() <= 3e-3 * truth.norm(), length
