"""BayesLoRA runs (mercury0100/bayeslora, `bayeslora/hf.py`).

ΔW = (lora_alpha / rank) · B_mu·A_mu with the rank before pruning: the means of the posterior, as
the model computes with sampling off. The file holds neither number. Pruned components are not in
the file; all of a module's may be gone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import RunError
from ..files.tensors import LazyTensors
from ..run import Run
from ..updates.rank_one import RankOneSum
from . import ReadOptions
from .checkpoint import Parts, checkpoint_run, number, open_checkpoint, weighted

_PART = re.compile(r"(.+)\.(?:([AB])_mu|((?:rank|A|B)_log_sigma2))")


class BayesLoraReader:
    """Reads a checkpoint folder; needs `lora_alpha` and `start_rank`."""

    name = "bayeslora"
    looks_for = "config.json, and a checkpoint whose tensors end in .A_mu and .B_mu"

    def detect(self, path: Path) -> Path | None:
        checkpoint = open_checkpoint(path)
        return path if checkpoint is not None and _modules(checkpoint.tensors) else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        checkpoint = open_checkpoint(folder)
        assert checkpoint is not None
        alpha = number({}, folder, ("lora_alpha",), options.lora_alpha, "lora_alpha")
        initial = number({}, folder, ("initial rank",), options.start_rank, "start_rank")
        modules = _modules(checkpoint.tensors)
        updates: dict[str, Callable[[], RankOneSum]] = {}
        for module, parts in modules.items():
            rank = _rank(module, parts)
            if rank > initial:
                raise RunError(
                    "the module has more components than the initial rank",
                    file=parts["A"].path,
                    tensor=f"{module}.A_mu",
                    found=rank,
                    expected=f"at most {initial}",
                    remedy="is this the `start_rank` of another run?",
                )
            updates[module] = _loader(parts, alpha / initial)
        shards = {
            file: {_unwrapped(name, modules): tensor for name, tensor in tensors.items()}
            for file, tensors in checkpoint.shards.items()
        }
        return checkpoint_run(
            replace(checkpoint, shards=shards),
            self.name,
            modules,
            updates,
            dict.fromkeys(modules, int(initial)),
            {"lora_alpha": alpha, "start_rank": initial},
        )


def _modules(tensors: LazyTensors) -> dict[str, Parts]:
    modules: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        if match := _PART.fullmatch(name):
            modules.setdefault(match[1], {})[match[2] or match[3]] = tensor
    return {module: parts for module, parts in modules.items() if parts.keys() & {"A", "B"}}


def _rank(module: str, parts: Parts) -> int:
    a, b = (parts[factor].shape if factor in parts else None for factor in "AB")
    if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise RunError(
            "A_mu and B_mu do not fit each other",
            file=next(iter(parts.values())).path,
            tensor=f"{module}.B_mu",
            found=f"A_mu {a and list(a)}, B_mu {b and list(b)}",
            expected="A_mu [rank, in] and B_mu [out, rank]",
        )
    return a[0]


def _unwrapped(name: str, modules: dict[str, Parts]) -> str:
    """The Hugging Face name: the wrapper keeps the layer it adapts as `base`."""
    module, _, kind = name.rpartition(".base.")
    return f"{module}.{kind}" if module in modules else name


def _loader(parts: Parts, scale: float) -> Callable[[], RankOneSum]:
    return lambda: weighted(parts, None, scale)
