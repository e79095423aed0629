"""Decoders (causal language models) as ONNX, by onnxruntime-genai's model builder where it computes
what they do, else, and where it fails, by torch (`causal.py`).

The builder runs in a process of its own: its memory goes when it ends.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...files.json_files import read_json
from ...files.onnx_files import BATCHED, GENAI, MODEL
from .branches import Site, add_branches
from .causal import build_causal
from .positions import add_positions
from .surgery import take

# What the builder makes and the tests cover.
_BUILT = {
    f"{family}ForCausalLM" for family in "Gemma Granite Llama Mistral Phi3 Qwen2 Qwen3".split()
}
# Kinds of rotary embedding that it computes as transformers does, and what they are made from.
_ROPE = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        *("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    },
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NODE = re.compile(r"/(?:model/layers\.(\d+)/(attn|mlp)|(lm_head))(?:/(\w+))?/MatMul(?:_Q[48])?")


def build_decoder(model: Path, out: Path, precision: str, *, adaptable: bool) -> None:
    """Write the graph of the Hugging Face folder `model` into `out`, configuration and tokenizer
    beside it; `adaptable`: both forms of it, with a branch behind every linear layer."""
    # The builder wants a tokenizer.
    named = any((model / name).exists() for name in _TOKENIZERS)
    if named and _builds(model) and _build(model, out, precision, adaptable):
        _finish(out / MODEL, adaptable)
    else:
        build_causal(model, out, precision, adaptable=adaptable)


def _builds(model: Path) -> bool:
    """Whether the builder makes of the model what it computes at every length. It leaves out
    windows, changes of the rotary embedding with a row's length, and layers without one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    if not _BUILT.intersection(config.architectures or []):
        return False
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and {*layers} != {"full_attention"}:
        return False
    rope = dict(config.rope_parameters)
    kind = rope.pop("rope_type", "default")
    if kind == "llama3" and "LlamaForCausalLM" not in config.architectures:
        return False
    return rope.keys() <= _ROPE.get(kind, set())


def _build(model: Path, out: Path, precision: str, adaptable: bool) -> bool:
    """Run the builder; False when it fails. `adaptable` keeps q, k and v apart, so that each can
    have a branch."""
    with tempfile.TemporaryDirectory(dir=out) as built, tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-m", model.name, "-i", str(model), "-o", built, "-c", cache]
        command += ["-p", precision, "-e", "cpu", "--extra_options", "hf_token=false"]
        if adaptable:
            command.append("fuse_qkv=false")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not Path(built, MODEL).exists():
            return False
        for file in Path(built).iterdir():
            file.replace(out / file.name)
    return True


def _finish(file: Path, adaptable: bool) -> None:
    """Mend the builder's graph, and add what it lacks: a choice of logits, and branches.

    Quantized MatMuls round the weights only: the builder's default rounds activations too, which
    costs a hundred times the accuracy. The shapes of values between nodes are left out: the
    builder calls the length of a float16 graph's cache that of its input. And the cache's last
    side is the number that `genai_config.json` tells, which the builder only names.
    """
    built = ir.load(file)
    for node in built.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    settings: Any = read_json(file.with_name(GENAI))
    size = settings["model"]["decoder"]["head_size"]
    for value in built.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            value.shape = ir.Shape([*list(value.shape or ())[:3], size])
    sites = decoder_sites(built)
    add_positions(built, sites["lm_head"].node)
    for name, batched in ((MODEL, False), (BATCHED, True))[: 2 if adaptable else 1]:
        model = built.clone()
        if adaptable:
            add_branches(model, sites.values(), batched)
        ir.save(model, file.with_name(name))


def decoder_sites(model: ir.Model) -> dict[str, Site]:
    """Every MatMul of a built decoder that a module of the model stands behind, by module name."""
    sites = {}
    for node in model.graph:
        match = _NODE.fullmatch(str(node.name))
        if not match:
            continue
        block = "self_attn" if match[2] == "attn" else "mlp"
        name = match[3] or f"model.layers.{match[1]}.{block}.{match[4]}"
        weight = take(node, 1).const_value
        if "K" in node.attributes:
            sizes = [node.attributes[side].as_int() for side in "KN"]
            sites[name] = Site(str(node.name), name, *sizes)
        elif weight is not None:
            sites[name] = Site(str(node.name), name, *weight.shape.numpy())
    return sites
