"""Tiny encoders with adapters, and what the live runs compute for token rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from peft import LoraConfig, get_peft_model

from converters.model.base import BaseModel
from converters.run import Run
from dora_serve.onnxruntime.encoder import Encoder
from dora_serve.proof.live import LiveModel
from tests.conftest import randomize
from tests.engines.decoders import dense

BOUND, MIXED = 1e-4, 1e-5
Built = tuple[BaseModel, dict[str, Run], Path]
# One layer, which is quickly exported: the reference runs and the samples have several.
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 80,
    "max_position_embeddings": 40,
}
DISTILBERT = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 80,
    "max_position_embeddings": 40,
}
DEBERTA = {
    **SIZES,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pooler_hidden_size": 32,
}
ROWS = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [33], [30, 31, 32, 33, 34]]


def tiny_base(name: str, folder: Path, sizes: dict[str, Any]) -> Path:
    """A random `<name>Model`, without any head."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():  # zero biases and unit norms would hide what is not computed
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    model.save_pretrained(folder)
    return folder


def tiny_lora(base: Path, cls: str, folder: Path, labels: int | None, **options: Any) -> Path:
    """A PEFT adapter with random values, a rank pattern, and a random head."""
    more = {} if labels is None else {"num_labels": labels}
    torch.manual_seed(len(str(folder)))
    model = getattr(transformers, cls).from_pretrained(base, **more)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **options))
    randomize(model, ("lora_", "modules_to_save"))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    model.save_pretrained(folder)
    return folder


def live_rows(
    run: Run,
    base: BaseModel,
    rows: Sequence[Sequence[int]],
    *,
    attached: bool = True,
    types: Sequence[Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Each row's outputs by name from the live run, padding cut off."""
    live = LiveModel(run, base)
    if not attached:
        live.detach()
    longest = max(map(len, rows))
    pad = live.model.config.pad_token_id or 0
    inputs = {
        "input_ids": torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows]),
    }
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([[*t, *[0] * (longest - len(t))] for t in types])
    with torch.inference_mode():
        output = live.model(**inputs)
    names = [n for n in ("logits", "start_logits", "end_logits") if n in output]
    found = []
    for i, row in enumerate(rows):
        values = {}
        for name in names or ["last_hidden_state"]:
            array = output[name][i].numpy()
            per_token = name != "logits" or array.ndim == 2
            values[name] = array[: len(row)] if per_token else array
        found.append(values)
    return found


def largest(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]) -> float:
    """The largest difference between two lists of rows' outputs."""
    assert [row.keys() for row in left] == [row.keys() for row in right]
    pairs = [(a[k], b[k]) for a, b in zip(left, right, strict=True) for k in a]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def dequantize(model: onnx.ModelProto) -> None:
    """MatMulNBits as MatMul of the weights it stands for."""
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            name = f"{node.name}/dequantized"
            weight = dense(node, values).T.copy()
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
            plain = onnx.helper.make_node("MatMul", [node.input[0], name], node.output, node.name)
            node.CopyFrom(plain)


def check_adapters(built: Built) -> None:
    """Each adapter alone against its live run and its control; all of them mixed, in any order."""
    base, runs, out = built
    encoder = Encoder(out)
    single = {}
    for name, run in runs.items():
        single[name] = encoder.run(ROWS, name)
        assert largest(single[name], live_rows(run, base, ROWS)) <= BOUND
        assert largest(single[name], live_rows(run, base, ROWS, attached=False)) > 1e-3
    single[None] = encoder.run(ROWS)  # type: ignore[index]
    names = [*runs, None]
    for shift in range(2):
        mixed = [names[(i + shift) % len(names)] for i in range(len(ROWS))]
        found = encoder.run(ROWS, mixed)
        wanted = [single[name][i] for i, name in enumerate(mixed)]  # type: ignore[index]
        assert largest(found, wanted) <= MIXED
