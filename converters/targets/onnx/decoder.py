"""Decoders (causal language models) as ONNX, by onnxruntime-genai's model builder where it knows
them, else by torch (`causal.py`).

The builder runs in a process of its own: its memory goes when it ends, and what it prints is shown
only when it fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TargetError
from ...files.json_files import read_json
from ...files.onnx_files import BATCHED, MODEL
from .branches import Site, add_branches
from .causal import build_causal
from .positions import add_positions

PRECISIONS = ("fp32", "fp16", "int8", "int4")
# What the builder makes and the tests cover.
_BUILT = {
    f"{family}ForCausalLM"
    for family in "Gemma Gemma2 Granite Llama Mistral Phi3 Qwen2 Qwen3 SmolLM3".split()
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NODE = re.compile(r"/(?:model/layers\.(\d+)/(attn|mlp)|(lm_head))(?:/(\w+))?/MatMul(?:_Q[48])?")

# Modules that the builder takes apart: Hugging Face name → the builder's parts, in row order.
_PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def build_decoder(model: Path, out: Path, precision: str, *, adaptable: bool) -> None:
    """Write the graph of the Hugging Face folder `model` into `out`, configuration and tokenizer
    beside it; `adaptable`: both forms of it, with a branch behind every linear layer."""
    architectures = read_json(model / "config.json").get("architectures")
    known = isinstance(architectures, list) and bool(_BUILT.intersection(architectures))
    # The builder wants a tokenizer.
    if not known or not any((model / name).exists() for name in _TOKENIZERS):
        build_causal(model, out, precision, adaptable=adaptable)
        return
    _build(model, out, precision, adaptable)
    if adaptable:
        _add_branches(out)


def _build(model: Path, out: Path, precision: str, adaptable: bool) -> None:
    """Run the builder; `adaptable` keeps q, k and v apart, so that each can have a branch."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-m", model.name, "-i", str(model), "-o", str(out), "-c", cache]
        command += ["-p", precision, "-e", "cpu", "--extra_options", "hf_token=false"]
        if adaptable:
            command.append("fuse_qkv=false")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (out / MODEL).exists():
        raise TargetError(
            "onnxruntime-genai's model builder cannot build this model",
            file=model,
            found=(done.stderr.strip().splitlines() or ["no output"])[-1][:300],
            remedy="is the architecture one it supports? deploy the merged model instead",
        )
    _mend(out / MODEL)


def _mend(path: Path) -> None:
    """Let quantized MatMuls round the weights only: the builder's default rounds activations too,
    which costs a hundred times the accuracy. And leave out the shapes of values between nodes:
    the builder calls the length of a float16 graph's cache that of its input. And compute logits
    only where they are wanted."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "MatMulNBits" else ():
            if attribute.name == "accuracy_level":
                attribute.i = 1
    del model.graph.value_info[:]
    add_positions(model.graph, decoder_sites(model.graph)["lm_head"].node)
    onnx.save(model, path)


def _add_branches(folder: Path) -> None:
    """Both forms of the graph in `folder`, over the same weights, able to carry adapters."""
    import onnx

    for file, batched in ((BATCHED, True), (MODEL, False)):
        model = onnx.load(folder / MODEL, load_external_data=False)
        add_branches(model, decoder_sites(model.graph).values(), batched)
        onnx.save(model, folder / file)


def decoder_sites(graph: Any) -> dict[str, Site]:
    """Every MatMul of a built decoder that a module of the model stands behind, by module name."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    sites = {}
    for node in graph.node:
        match = _NODE.fullmatch(node.name)
        if not match:
            continue
        block = "self_attn" if match[2] == "attn" else "mlp"
        name = match[3] or f"model.layers.{match[1]}.{block}.{match[4]}"
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        if "K" in sizes:
            sites[name] = Site(node.name, name, sizes["K"], sizes["N"])
        elif node.input[1] in shapes:
            sites[name] = Site(node.name, name, *shapes[node.input[1]])
    return sites


def place(module: str, shape: tuple[int, int], sites: Mapping[str, Site]) -> list[tuple[Site, int]]:
    """The sites that compute an update of `shape [out, in]`, each with the update's first row
    there: the builder takes packed modules (q, k and v in one) apart.

    Raises `TargetError` where the graph has no such site, or one of another shape.
    """
    names = [module]
    for packed, parts in _PACKED.items():
        if module not in sites and module.endswith(packed):
            names = [module.removesuffix(packed) + part for part in parts]
    placed, row = [], 0
    for site in (sites[name] for name in names if name in sites):
        placed.append((site, row))
        row += site.out_features
    if not placed or row != shape[0] or any(s.in_features != shape[1] for s, _ in placed):
        raise TargetError(
            "the graph has no place for this module's update",
            tensor=module,
            found=[f"{s.name} [{s.out_features}, {s.in_features}]" for s, _ in placed] or "none",
            expected=list(shape),
            remedy="export it merged: dora-export onnx RUN OUT",
        )
    return placed
