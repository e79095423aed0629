"""Runs on the tests' tiny Llama, and what PEFT makes of their adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from converters.run import Run
from tests.converters import made
from tests.converters.made import certificate, delta_of, low_rank

LAYER = "model.layers.{}.self_attn.{}"
Q0, Q1 = LAYER.format(0, "q_proj"), LAYER.format(1, "q_proj")
K0, V0 = LAYER.format(0, "k_proj"), LAYER.format(0, "v_proj")
UP0, DOWN1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
SHAPES = {
    Q0: (32, 32),
    Q1: (32, 32),
    K0: (16, 32),
    V0: (16, 32),
    UP0: (48, 32),
    DOWN1: (32, 48),
    EMBED: (80, 32),
    HEAD: (80, 32),
}


def make_run(folder: Path, ranks: Mapping[str, int], **more: Any) -> Run:
    updates = {m: low_rank(*SHAPES[m], rank, n) for n, (m, rank) in enumerate(ranks.items())}
    return made.make_run(folder, updates, **more)


def gpt2(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=layers, n_head=2, vocab_size=40, n_positions=20)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def errors(folder: Path) -> dict[str, float]:
    return {name: said["error"] for name, said in certificate(folder)["modules"].items()}


def ranks_in(folder: Path) -> dict[str, int]:
    return {name: said["rank"] for name, said in certificate(folder)["modules"].items()}


def deployed(base: Path, adapter: Path, model: Any = AutoModelForCausalLM) -> dict[str, Any]:
    """The weights that PEFT makes of it, in float64."""
    loaded = PeftModel.from_pretrained(model.from_pretrained(base), str(adapter))
    state = loaded.merge_and_unload().state_dict()
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def assert_deployed(found: Mapping[str, Any], base: Path, run: Run) -> None:
    weights = load_file(base / "model.safetensors")
    assert {f"{module}.weight" for module in run.updates} <= weights.keys()
    for name, weight in weights.items():
        expected = weight.double().numpy()
        module = name.removesuffix(".weight")
        if name in run.replaced:
            expected = run.replaced[name].load().double().numpy()
        if module in run.updates:
            change = delta_of(run.updates[module])
            expected = expected + (change.T if change.shape != expected.shape else change)
        scale = np.abs(expected).max()
        assert np.abs(found[name] - expected).max() <= 4e-6 * scale, name
