"""Runs of trainers other than PEFT, and adapters in shards, as one target: number, configurations
and header of a run as one text."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import CLIPTextConfig, CLIPTextModel

from converters.model.base import open_base
from converters.targets.merged.plan import plan_merge
from dora_serve import ReadOptions, read_run
from tests.conftest import tiny_llama
from tests.converters.test_kohya import flat
from tests.converters.test_litgpt import TRAINING
from tests.converters.test_mlx_lm import ARGUMENTS
from tests.converters.test_torchtune import ALL
from tests.fuzz.methods import packed, unpacked
from tests.fuzz.mutate import SPLIT

_Q = "model.layers.0.self_attn.q_proj"
_PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
_SHARDS = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
_SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 16, "vocab_size": 16}
Tensors = dict[str, torch.Tensor]


def _pair(name: str, a: str, b: str, out: int = 16, inn: int = 16) -> Tensors:
    return {f"{name}.{a}": torch.ones(2, inn), f"{name}.{b}": torch.ones(out, 2)}


def _mlx() -> tuple[dict[str, Any], Tensors]:
    experts = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{_Q}.lora_a": torch.ones(16, 2), f"{_Q}.lora_b": torch.ones(2, 16)}
    tensors |= {f"{experts}.lora_a": torch.ones(2, 2, 16)}
    tensors |= {f"{experts}.lora_b": torch.ones(2, 16, 2)}
    return {"adapter_config.json": ARGUMENTS}, tensors


def _mlx_dora() -> tuple[dict[str, Any], Tensors]:
    tensors = {f"{_Q}.lora_a": torch.ones(16, 2), f"{_Q}.lora_b": torch.ones(2, 16)}
    config = {**ARGUMENTS, "fine_tune_type": "dora"}
    return {"adapter_config.json": config}, {**tensors, f"{_Q}.m": torch.ones(16)}


def _torchtune() -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {}
    for name in ALL[:2]:
        out = 8 if "k_proj" in name else 16
        tensors |= _pair(name, "lora_a.weight", "lora_b.weight", out)
    tensors[f"{ALL[0]}.magnitude"] = torch.ones(16)
    config = tiny_llama(**_SIZES, num_key_value_heads=1).config.to_dict()
    return {"adapter_config.json": _PEFT, "config.json": config}, tensors


def _litgpt() -> tuple[dict[str, Any], Tensors]:
    layer = "transformer.h.0.attn"
    tensors = {f"{layer}.qkv.lora_A": torch.ones(4, 16), f"{layer}.qkv.lora_B": torch.ones(24, 2)}
    tensors |= _pair(f"{layer}.proj", "lora_A", "lora_B")
    model = {"name": "Llama-3.2-1B", "mlp_class_name": "LLaMAMLP", "n_head": 2}
    model |= {"n_query_groups": 1, "head_size": 8, "hf_config": {"org": "o", "name": "n"}}
    training = {**TRAINING, "lora_r": 2}
    return {"hyperparameters.yaml": training, "model_config.yaml": model}, tensors


def _kohya() -> tuple[dict[str, Any], Tensors]:
    stem = flat("encoder.layers.0.self_attn.q_proj")
    tensors = _pair(stem, "lora_down.weight", "lora_up.weight")
    return {}, {**tensors, f"{stem}.alpha": torch.tensor(1.0)}


def _shards() -> tuple[dict[str, Any], Tensors]:
    tensors = _pair(f"base_model.model.{_Q}", "lora_A.weight", "lora_B.weight")
    return {"adapter_config.json": _PEFT}, tensors


# What makes each; the file of its tensors.
_KINDS: list[tuple[Callable[[], tuple[dict[str, Any], Tensors]], str]] = [
    (_mlx_dora, "adapters.safetensors"),
    (_mlx, "adapters.safetensors"),
    (_torchtune, "adapter_model.pt"),
    (_litgpt, "lit_model.pth.lora"),
    (_kohya, "kohya.safetensors"),
    (_shards, _SHARDS[0]),
]


def prepare_trainers(folder: Path) -> list[bytes]:
    tiny_llama(**_SIZES, num_key_value_heads=1).save_pretrained(folder / "base")
    text = CLIPTextConfig(**_SIZES, max_position_embeddings=8)
    CLIPTextModel(text).save_pretrained(folder / "text")
    seeds = []
    for kind, (make, _) in enumerate(_KINDS):
        configs, tensors = make()
        header, data = unpacked(save(tensors))
        said = {"kind": kind, "files": configs, "header": json.loads(header)}
        seeds.append(json.dumps(said, default=str).encode() + SPLIT + data)
    return seeds


def read_trainer(folder: Path, data: bytes) -> None:
    text, _, rest = data.partition(SPLIT)
    try:
        said = json.loads(text)
        make, file = _KINDS[said["kind"]]
        known = make()[0].keys()
        files = {name: json.dumps(said["files"][name]) for name in known}
        header = json.dumps(said["header"]).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return  # not of this form: nothing of ours reads it
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for name, content in files.items():
        (run / name).write_text(content)
    weights = packed(header, rest)
    if file.endswith(".safetensors"):
        (run / file).write_bytes(weights)
    else:  # its own form is fuzzed elsewhere
        with contextlib.suppress(SafetensorError, ValueError, LookupError):
            tensors = load(weights)
            torch.save({"model": tensors} if "lit" in file else tensors, run / file)
    if file == _SHARDS[0]:
        name = f"base_model.model.{_Q}".replace("q_proj", "v_proj")
        other = _pair(name, "lora_A.weight", "lora_B.weight", 8)
        (run / _SHARDS[1]).write_bytes(save(other))
    base = folder / ("text" if make is _kohya else "base")
    found = read_run(run, ReadOptions(base=base)).strip()
    for update in found.updates.values():
        update.components()
    plan_merge(found, open_base(base), None)
