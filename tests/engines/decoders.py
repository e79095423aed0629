"""What stands in a decoder's 4-bit graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Module → float32 weight `[out, in]` of every 4-bit MatMul: (q − 8)·scale in blocks of 32."""
    graph = onnx.load(folder / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        size = {a.name: a.i for a in node.attribute}
        packed, scales = stored[node.input[1]], stored[node.input[2]]
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(size["N"], -1, 32)
        dense = (values.astype(np.float32) - 8) * scales.reshape(size["N"], -1, 1)
        name = node.name.split("/MatMul")[0].strip("/").replace("/", ".")
        name = name.replace(".attn.", ".self_attn.")
        weights[name] = torch.from_numpy(dense.reshape(size["N"], -1)[:, : size["K"]])
    return weights
