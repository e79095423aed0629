"""Decoders in ONNX Runtime: what proves a folder right, and what stands in a 4-bit graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from converters.model.base import open_base
from dora_serve import Run
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.model import OnnxDecoder
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.proof.live import LiveModel
from dora_serve.proof.verify import logits, verification_batch

BOUND = 1e-4
PROMPTS = ("count : nine", "copy : cat moon river =", "count : twenty-one", "count : five")


@dataclass
class Case:
    """An exported folder, its base, and the runs whose adapters it holds."""

    folder: Path
    base: Path
    runs: dict[str, Run]


def greedy(model: Any, row: Sequence[int], steps: int) -> list[int]:
    """The next `steps` tokens of a torch model without cache, one row, no padding."""
    ids = list(row)
    with torch.inference_mode():
        for _ in range(steps):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(row) :]


def truths(case: Case) -> dict[str | None, Any]:
    """A live model for every adapter and for none; each a model of its own."""
    base = open_base(case.base)
    models: dict[str | None, Any] = {n: LiveModel(r, base).model for n, r in case.runs.items()}
    bare = LiveModel(next(iter(case.runs.values())), base)
    bare.detach()
    return {**models, None: bare.model}


def check(case: Case, steps: int) -> None:
    """Logits and greedy tokens of every adapter, alone and in a mixed, padded batch."""
    models = truths(case)
    deployed = OnnxDecoder(case.folder)
    inputs = verification_batch(models[None])
    expected = {name: logits(model, inputs) for name, model in models.items()}
    for name, truth in expected.items():
        deployed.adapters = name
        found = logits(deployed, inputs)
        assert float((found - truth).abs().max()) <= BOUND
        assert torch.equal(found.argmax(-1), truth.argmax(-1))
        if name is not None:
            assert float((truth - expected[None]).abs().max()) > 1e-2  # the control
    names = list(models)
    for order in (names, names[::-1]):
        wanted = [order[i % len(order)] for i in range(len(inputs["input_ids"]))]
        deployed.adapters = wanted
        mixed = logits(deployed, inputs)
        for row, name in enumerate(wanted):
            deployed.adapters = name
            alone = logits(deployed, inputs)[row]
            assert float((mixed[row] - alone).abs().max()) <= 1e-5
    decoder = Decoder(case.folder, threads=2)
    prompts = [decoder.encode(prompt) for prompt in PROMPTS]
    wanted = [names[i % len(names)] for i in range(len(prompts))]
    done = decoder.generate(prompts, wanted, Sampling(max_tokens=steps, ignore_eos=True))
    for prompt, name, completion in zip(prompts, wanted, done, strict=True):
        assert completion.tokens == greedy(models[name], prompt, steps)


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
