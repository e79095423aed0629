"""Made-up bases, runs and updates, and what they should become, in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from converters.files.tensors import open_file
from converters.run import Run
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 6}
WEIGHTS = "model.safetensors"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_base(folder: Path, *shards: Mapping[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / WEIGHTS, {"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(dict(tensors), folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def make_run(folder: Path, updates: Mapping[str, Update], **more: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, "test", updates, **more)


def low_rank(out: int, inn: int, rank: int = 2, seed: int = 0, size: float = 1.0) -> RankOneSum:
    """Scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    return RankOneSum(
        torch.randn(rank, inn, generator=generator),
        size * torch.linspace(1, 2, rank) * torch.tensor([1.0, -1.0]).repeat(rank)[:rank],
        torch.randn(out, rank, generator=generator),
    )


def delta_of(update: Update) -> np.ndarray:
    """ΔW `[out, in]` of a sum."""
    assert isinstance(update, RankOneSum)
    a, c, b = (part.double().numpy() for part in (update.a, update.c, update.b))
    result: np.ndarray = (b * c) @ a
    return result


def moved(weight: torch.Tensor, update: RankOneSum, transposed: bool = False) -> np.ndarray:
    """W + ΔW, or + ΔWᵀ."""
    change = delta_of(update)
    result: np.ndarray = weight.double().numpy() + (change.T if transposed else change)
    return result


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(found.double().numpy() - expected) <= 4e-6 * scale).all()


def lazy(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`tensors` as a run's reader opens them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "whole.safetensors")
    return open_file(folder / "whole.safetensors")


def certificate(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "dora_export.json").read_text())
    return value


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value
