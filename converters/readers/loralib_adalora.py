"""AdaLoRA checkpoints of the authors' loralib (QingruZhang/AdaLoRA, `loralib/adalora.py`).

ΔW = lora_alpha / (ranknum + 1e-5) · B·diag(E)·A (Zhang et al. 2023, arXiv 2303.10512), with
`lora_alpha` in config.json. Pruned components stay in the file with E exactly zero.
"""

from __future__ import annotations

from ..options import ReadOptions
from ..run import Run
from ..updates.rank_one import RankOneSum
from .lora_reader import Adaptation, CheckpointFiles
from .module import AdaptedModule, adapted
from .run_folder import RunFolder


class LoralibAdaloraReader:
    """Reads a checkpoint folder."""

    name = "loralib_adalora"
    looks_for = "config.json, and a checkpoint whose tensors end in .lora_A, .lora_E and .lora_B"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        modules = {} if folder.checkpoint is None else adapted(folder.checkpoint.tensors)
        return folder if any("lora_E" in module.parts for module in modules.values()) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = CheckpointFiles(folder)
        alpha = files.alpha(options.lora_alpha)

        def adapt(module: AdaptedModule) -> Adaptation:
            rank = module.pair()
            module.need("lora_E", rank, "lora_A, lora_E and lora_B")
            if "ranknum" in module.parts:
                module.check_size("ranknum", 1)

            def load() -> RankOneSum:
                counted = float(module.load("ranknum")) if "ranknum" in module.parts else rank
                return module.sum(alpha / (counted + 1e-5), "lora_E")

            return Adaptation(rank, load)

        return files.run(self.name, adapted(files.tensors), adapt, {"lora_alpha": alpha})
