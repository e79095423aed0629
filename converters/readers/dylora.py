"""DyLoRA checkpoints (huawei-noah/Efficient-NLP, `DyLoRA/loralib/`; Valipour et al. 2022,
arXiv 2210.07558), and plain LoRA of loralib, which is the same file.

The components are nested: any first b of the r stored ones are a model. In use are
ΔW = (lora_alpha / b) · B[:, :b]·A[:b], as √(r/b) enters A and B beside lora_alpha / r. Which b
was meant is not stored: after the authors' `set_rank(i)` it is i + 1. With b = r this is plain
LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import RunError
from ..run import Run
from ..updates.rank_one import RankOneSum
from . import ReadOptions
from .checkpoint import Parts, adapted, checkpoint_run, number, open_checkpoint, weighted
from .peft_common import check_pair


class DyloraReader:
    """Reads a checkpoint folder; needs `rank`."""

    name = "dylora"
    looks_for = "config.json, and a checkpoint whose tensors end in .lora_A and .lora_B"

    def detect(self, path: Path) -> Path | None:
        checkpoint = open_checkpoint(path)
        modules = adapted(checkpoint.tensors) if checkpoint is not None else {}
        plain = all(parts.keys() <= {"A", "B"} for parts in modules.values())
        return path if modules and plain else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        checkpoint = open_checkpoint(folder)
        assert checkpoint is not None
        path = folder / "config.json"
        alpha = number(checkpoint.config, path, ("lora_alpha",), options.lora_alpha, "lora_alpha")
        modules = adapted(checkpoint.tensors)
        start_rank = {
            module: check_pair(module, parts, next(iter(parts.values())).path)
            for module, parts in modules.items()
        }
        rank, largest = options.rank, min(start_rank.values())
        if rank is None or not 1 <= rank <= largest:
            raise RunError(
                "how many of the nested components are in use is not known",
                file=folder,
                found=rank,
                expected=f"a number from 1 to {largest}",
                remedy=f"pass `rank` (for a plain LoRA checkpoint its own rank, {largest})",
            )
        updates = {module: _loader(parts, rank, alpha) for module, parts in modules.items()}
        chosen = {"lora_alpha": alpha, "rank": rank}
        return checkpoint_run(checkpoint, self.name, modules, updates, start_rank, chosen)


def _loader(parts: Parts, rank: int, alpha: float) -> Callable[[], RankOneSum]:
    def load() -> RankOneSum:
        whole = weighted(parts, None, alpha / rank)
        return RankOneSum(whole.a[:rank], whole.c[:rank], whole.b[:, :rank])

    return load
