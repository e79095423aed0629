"""IncreLoRA checkpoints (FeiyuZhang98/IncreLoRA, `loralib/increlora.py`; Zhang et al. 2023,
arXiv 2308.12043).

Ranks grow: `X.lora_A.<i>`, `X.lora_E.<i>`, `X.lora_B.<i>` are put together in the order of i, and
ΔW = lora_alpha / (ranknum + 1e-5) · B·diag(E)·A. A reserve that never became a component has
E = 0, or what it was given for learning ahead, which the live model computes with too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import load_finite
from ..model.base import BaseModel
from ..run import Run
from ..updates.rank_one import RankOneSum
from . import ReadOptions
from .checkpoint import Parts, check_size, checkpoint_run, number, open_checkpoint

_PIECE = re.compile(r"(.+)\.(lora_[AEB]\.\d+|ranknum)")


class IncreloraReader:
    """Reads a checkpoint folder."""

    name = "increlora"
    looks_for = "config.json, and a checkpoint whose tensors end in .lora_A.0, .lora_E.0, .lora_B.0"

    def detect(self, path: Path) -> Path | None:
        checkpoint = open_checkpoint(path)
        found = checkpoint is not None and any(
            name.endswith(".lora_E.0") for name in checkpoint.tensors
        )
        return path if found else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        checkpoint = open_checkpoint(folder)
        assert checkpoint is not None
        path = folder / "config.json"
        alpha = number(checkpoint.config, path, ("lora_alpha",), options.lora_alpha, "lora_alpha")
        modules = _modules(checkpoint)
        updates: dict[str, Callable[[], RankOneSum]] = {}
        start_rank = {}
        for module, parts in modules.items():
            start_rank[module] = _check(module, parts)
            updates[module] = _loader(parts, alpha)
        return checkpoint_run(
            checkpoint, self.name, modules, updates, start_rank, {"lora_alpha": alpha}
        )


def _modules(checkpoint: BaseModel) -> dict[str, Parts]:
    modules: dict[str, Parts] = {}
    for name, tensor in checkpoint.tensors.items():
        if match := _PIECE.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = tensor
    return modules


def _count(parts: Parts) -> int:
    return sum(part.startswith("lora_E.") for part in parts)


def _check(module: str, parts: Parts) -> int:
    """The number of stored components; raises `RunError` when the pieces do not fit together."""
    file = next(iter(parts.values())).path
    count = max(_count(parts), 1)
    needed = {f"lora_{letter}.{i}" for letter in "AEB" for i in range(count)} | {"ranknum"}
    if parts.keys() != needed:
        raise RunError(
            "the pieces of an adapted module are not complete",
            file=file,
            tensor=f"{module}.{min(parts.keys() ^ needed)}",
            found=", ".join(sorted(parts)),
            expected=f"lora_A, lora_E and lora_B from 0 to {count - 1}, and ranknum",
        )
    check_size(module, "ranknum", parts["ranknum"], 1)
    total = 0
    for i in range(count):
        a, e, b = (parts[f"lora_{letter}.{i}"] for letter in "AEB")
        first_a, first_b = parts["lora_A.0"].shape, parts["lora_B.0"].shape
        rank = a.shape[0]
        if a.shape != (rank, first_a[-1]) or b.shape != (first_b[0], rank):
            raise RunError(
                "the pieces of an adapted module do not fit together",
                file=file,
                tensor=f"{module}.lora_B.{i}",
                found=f"lora_A.{i} {list(a.shape)}, lora_B.{i} {list(b.shape)}",
                expected=f"[k, {first_a[-1]}] and [{first_b[0]}, k]",
            )
        check_size(module, f"lora_E.{i}", e, rank)
        total += rank
    return total


def _loader(parts: Parts, alpha: float) -> Callable[[], RankOneSum]:
    def load() -> RankOneSum:
        order = range(_count(parts))
        a = torch.cat([load_finite(parts[f"lora_A.{i}"]) for i in order])
        e = torch.cat([load_finite(parts[f"lora_E.{i}"]).flatten() for i in order])
        b = torch.cat([load_finite(parts[f"lora_B.{i}"]) for i in order], dim=1)
        scale = alpha / (float(load_finite(parts["ranknum"])) + 1e-5)
        return RankOneSum(a, (e.double() * scale).float(), b)

    return load
