"""AdaLoRA checkpoints of the authors' loralib (QingruZhang/AdaLoRA, `loralib/adalora.py`).

ΔW = lora_alpha / (ranknum + 1e-5) · B·diag(E)·A (Zhang et al. 2023, arXiv 2303.10512), with
`lora_alpha` in config.json. Pruned components stay in the file with E exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import RunError
from ..files.tensors import load_finite
from ..run import Run
from ..updates.rank_one import RankOneSum
from . import ReadOptions
from .checkpoint import (
    Parts,
    adapted,
    check_size,
    checkpoint_run,
    number,
    open_checkpoint,
    weighted,
)
from .peft_common import check_pair


class LoralibAdaloraReader:
    """Reads a checkpoint folder."""

    name = "loralib_adalora"
    looks_for = "config.json, and a checkpoint whose tensors end in .lora_A, .lora_E and .lora_B"

    def detect(self, path: Path) -> Path | None:
        checkpoint = open_checkpoint(path)
        found = checkpoint is not None and any(
            "lora_E" in parts for parts in adapted(checkpoint.tensors).values()
        )
        return path if found else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        checkpoint = open_checkpoint(folder)
        assert checkpoint is not None
        path = folder / "config.json"
        alpha = number(checkpoint.config, path, ("lora_alpha",), options.lora_alpha, "lora_alpha")
        modules = adapted(checkpoint.tensors)
        updates: dict[str, Callable[[], RankOneSum]] = {}
        start_rank = {}
        for module, parts in modules.items():
            if "lora_E" not in parts:
                raise RunError(
                    "an adapted module is incomplete",
                    file=next(iter(parts.values())).path,
                    tensor=f"{module}.lora_E",
                    expected="lora_A, lora_E and lora_B",
                )
            start_rank[module] = check_pair(module, parts, next(iter(parts.values())).path)
            check_size(module, "lora_E", parts["lora_E"], start_rank[module])
            if "ranknum" in parts:
                check_size(module, "ranknum", parts["ranknum"], 1)
            updates[module] = _loader(parts, alpha)
        return checkpoint_run(
            checkpoint, self.name, modules, updates, start_rank, {"lora_alpha": alpha}
        )


def _loader(parts: Parts, alpha: float) -> Callable[[], RankOneSum]:
    def load() -> RankOneSum:
        rank = float(load_finite(parts["ranknum"])) if "ranknum" in parts else parts["A"].shape[0]
        return weighted(parts, "lora_E", alpha / (rank + 1e-5))

    return load
