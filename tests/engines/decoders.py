"""Decoders in ONNX Runtime: what proves a folder right, and what stands in a 4-bit graph."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from converters.model.base import open_base
from dora_serve import Run
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.model import OnnxDecoder
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.proof.live import LiveModel
from dora_serve.proof.verify import logits, verification_batch

BOUND = 1e-4
EFFECT = 0.05  # of an adapter, by which it may differ where activations are rounded; 0.023 found
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


def dense(node: onnx.NodeProto, stored: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The float32 weight `[out, in]` of a MatMulNBits: (q - zero)·scale of its block."""
    size = {a.name: a.i for a in node.attribute}
    values, scales, *zeros = (stored[name] for name in node.input[1:])
    zero: NDArray[Any] = np.full(scales.shape, 1 << size["bits"] - 1, np.uint8)
    if size["bits"] == 4:
        values = np.stack([values & 15, values >> 4], axis=-1)
        halves = [np.stack([each & 15, each >> 4], axis=-1) for each in zeros]
        zero = [*(each.reshape(size["N"], -1) for each in halves), zero][0]
    steps = values.reshape(*scales.shape, size["block_size"]).astype(np.float32)
    weight: NDArray[np.float32] = (steps - zero[:, : scales.shape[1], None]) * scales[..., None]
    return weight.reshape(size["N"], -1)[:, : size["K"]]


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Module → the weight of every MatMulNBits."""
    graph = onnx.load(folder / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            cut = [n for n in graph.node if n.op_type == "Split" and n.input[0] == node.output[0]]
            outputs = stored[cut[0].input[1]] if cut else np.array([0])
            parts = np.split(dense(node, stored), np.cumsum(outputs)[:-1])
            for one, weight in zip(node.name.split("+"), parts, strict=True):
                name = one.split("/MatMul")[0].strip("/").replace("/", ".")
                weights[name.replace(".attn.", ".self_attn.")] = torch.from_numpy(weight)
    return weights


def in_floats(folder: Path, out: Path) -> Path:
    """A copy of the folder whose graphs do not round what they multiply their weights with."""
    shutil.copytree(folder, out)
    for file in out.glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        levels = [a for n in model.graph.node for a in n.attribute if a.name == "accuracy_level"]
        assert levels
        for level in levels:
            level.i = 1
        onnx.save(model, file)
    return out


def displace_small_tensors(file: Path) -> None:
    """Let the float32 tensors that a graph holds itself be read from the begin of its weights."""
    model = onnx.load(file, load_external_data=False)
    begin = (file.parent / "model.onnx.data").read_bytes()
    small = [t for t in model.graph.initializer if t.data_location == 0 and t.data_type == 1]
    assert any(tensor.raw_data for tensor in small)
    for tensor in small:
        tensor.raw_data = begin[: len(tensor.raw_data)]
    onnx.save(model, file)
