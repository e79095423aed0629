"""DyLoRA checkpoints (huawei-noah/Efficient-NLP, `DyLoRA/loralib/`; Valipour et al. 2022,
arXiv 2210.07558), and plain LoRA of loralib, which is the same file.

The components are nested: any first b of the r stored ones are a model. In use are
ΔW = (lora_alpha / b) · B[:, :b]·A[:b], as √(r/b) enters A and B beside lora_alpha / r. Which b
was meant is not stored: after the authors' `set_rank(i)` it is i + 1. With b = r this is plain
LoRA.
"""

from __future__ import annotations

from ..errors import RunError
from ..options import ReadOptions
from ..run import Run
from ..updates.rank_one import RankOneSum
from .lora_reader import Adaptation, CheckpointFiles
from .module import AdaptedModule, adapted
from .run_folder import RunFolder


class DyloraReader:
    """Reads a checkpoint folder; needs `rank`."""

    name = "dylora"
    looks_for = "config.json, and a checkpoint whose tensors end in .lora_A and .lora_B"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        modules = {} if folder.checkpoint is None else adapted(folder.checkpoint.tensors)
        plain = all(module.parts.keys() <= {"A", "B"} for module in modules.values())
        return folder if modules and plain else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = CheckpointFiles(folder)
        alpha = files.alpha(options.lora_alpha)
        modules = adapted(files.tensors)
        rank, largest = options.rank, min(module.pair() for module in modules.values())
        if rank is None or not 1 <= rank <= largest:
            raise RunError(
                "how many of the nested components are in use is not known",
                file=folder.path,
                found=rank,
                expected=f"a number from 1 to {largest}",
                remedy=f"pass `rank` (for a plain LoRA checkpoint its own rank, {largest})",
            )

        def adapt(module: AdaptedModule) -> Adaptation:
            def load() -> RankOneSum:
                nested = module.sum(alpha / rank)
                return RankOneSum(nested.a[:rank], nested.c[:rank], nested.b[:, :rank])

            return Adaptation(module.pair(), load)

        return files.run(self.name, modules, adapt, {"lora_alpha": alpha, "rank": rank})
