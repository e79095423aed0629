"""Decoders (causal language models) as ONNX, by onnxruntime-genai's model builder where it computes
what they do, else, and where it refuses the model, by torch (`causal.py`).

The builder runs in a process of its own: its memory goes when it ends. Where that was killed, or
had no room, there is an error: the same model shall not have another graph the next time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...errors import OutputError
from ...files.interpreters import environment
from ...files.json_files import read_json
from ...files.onnx_files import BATCHED, GENAI, MODEL
from ...model.architecture import known_model
from .adapters import Site
from .branches import add_branches
from .causal import build_causal
from .graph_file import GraphWriter
from .loaded import TOKENIZERS, write_companions
from .positions import add_positions
from .surgery import take

# What the builder makes and the tests cover. It rounds a factor of Gemma's to two decimals.
_BUILT = {f"{family}ForCausalLM" for family in "Granite Llama Mistral Phi3 Qwen2 Qwen3".split()}
# Kinds of rotary embedding that it can compute as transformers does, and what they are made from.
_ROPE = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        *("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    },
}
_REFUSES = (1, 2)  # how a Python process ends with an exception, or that was asked wrongly
_PASSING = re.compile(
    r"\[Errno \d+\]|\(os error \d+\)|MemoryError|bad_alloc|allocate memory|No space"
)
_NODE = re.compile(r"/(?:model/layers\.(\d+)/(attn|mlp)|(lm_head))(?:/(\w+))?/MatMul")


def build_decoder(model: Path, out: Path, writer: GraphWriter, *, adaptable: bool) -> None:
    """Write the graph of the Hugging Face folder `model` into `out`, configuration and tokenizer
    beside it; `adaptable`: both forms of it, with a branch behind every linear layer."""
    # The builder wants a tokenizer.
    named = any((model / name).exists() for name in TOKENIZERS)
    with tempfile.TemporaryDirectory(dir=out) as built:
        done = named and _builds(model) and _build(model, Path(built), writer.precision, adaptable)
        if done and _rotates(graph := ir.load(Path(built, MODEL)), model):
            _finish(graph, read_json(Path(built, GENAI)), writer, adaptable)
            write_companions(out, model)
            for path in Path(built).iterdir():
                if path.is_dir():  # further chat templates, of which the source may have a folder
                    shutil.copytree(path, out / path.name, dirs_exist_ok=True)
                elif not path.name.startswith(MODEL):
                    path.replace(out / path.name)
            return
    build_causal(model, out, writer, adaptable=adaptable)


def _builds(model: Path) -> bool:
    """Whether the builder makes of the model what it computes at every length. It leaves out
    windows, changes of the rotary embedding with a row's length, and layers without one; the
    attention with a rotary embedding in it takes heads of a multiple of 16 numbers alone; and
    every linear layer with as many outputs as there are words is the head to it."""
    from torch.nn import Linear
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    built = _BUILT.intersection(config.architectures or [])
    if not built:
        return False
    modules = known_model(built.pop(), read_json(model / "config.json")).modules()
    wide = (each.out_features for each in modules if isinstance(each, Linear))
    if sum(size == config.vocab_size for size in wide) != 1:
        return False
    if (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) % 16:
        return False
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and {*layers} != {"full_attention"}:
        return False
    rope = dict(config.rope_parameters)
    kind = rope.pop("rope_type", "default")
    return rope.keys() <= _ROPE.get(kind, set())


def _build(model: Path, built: Path, precision: str, adaptable: bool) -> bool:
    """Run the builder; False when it refuses the model. `adaptable` keeps q, k and v apart, so that
    each can have a branch.

    Raises `OutputError` when it broke off for a reason that the model is not.
    """
    with tempfile.TemporaryDirectory(dir=built.parent) as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-m", model.name, "-i", str(model), "-o", str(built), "-c", cache]
        command += ["-p", "fp16" if precision == "fp16" else "fp32", "-e", "cpu"]
        command += ["--extra_options", "hf_token=false"]
        if adaptable:
            command.append("fuse_qkv=false")
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment()
        )
    said = done.stderr.rpartition("Traceback (most recent call last)")[2].strip()
    if done.returncode and (done.returncode not in _REFUSES or _PASSING.search(said)):
        raise OutputError(
            "the process that builds the graph broke off",
            found=f"exit code {done.returncode}: {said[-300:]}",
            remedy="run it again with more room on the disk and in memory",
        )
    return done.returncode == 0 and (built / MODEL).exists()


def _rotates(graph: ir.Model, model: Path) -> bool:
    """Whether the rotary embedding of a built graph is that of the model's class: the builder knows
    fewer kinds of it than transformers, and for some of its families leaves out the others."""
    import torch
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    whole = known_model(config.architectures[0], read_json(model / "config.json"))
    names = dict(whole.named_modules())
    rotary = type(next(m for name, m in names.items() if name.endswith("rotary_emb")))(config)
    tables = [graph.graph.initializers[f"{name}_cache"].const_value for name in ("cos", "sin")]
    found = [table.numpy() for table in tables if table]
    rows, half = found[0].shape
    # A power of two apart: low frequencies tell late, and high ones differ late by rounding alone.
    at = torch.tensor(sorted({min(1 << i, rows - 1) for i in range(rows.bit_length())}))
    truth = rotary(torch.zeros(1), at[None])
    bound = 1e-3 + 1e-6 * at[:, None] * rotary.inv_freq[:half]
    return all(
        bool(((torch.from_numpy(table[at]).float() - told[0, :, :half]).abs() <= bound).all())
        for table, told in zip(found, truth, strict=True)
    )


def _finish(built: ir.Model, settings: Any, writer: GraphWriter, adaptable: bool) -> None:
    """Write the builder's graph with what it lacks: a choice of logits, and branches.

    The shapes of values between nodes are left out: the builder calls the length of a float16
    graph's cache that of its input. And the cache's last side is the number that
    `genai_config.json` tells, which the builder only names. Beside its version the builder writes
    the commit of the repository that its own folder happens to lie in.
    """
    built.producer_version = str(built.producer_version).partition("+")[0]
    for node in built.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
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
        writer.write(name, model, modules={site.node: site.name for site in sites.values()})


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
        if weight is not None:
            sites[name] = Site(str(node.name), name, *weight.shape.numpy())
    return sites
