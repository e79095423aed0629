"""IncreLoRA checkpoints (FeiyuZhang98/IncreLoRA, `loralib/increlora.py`; Zhang et al. 2023,
arXiv 2308.12043).

Ranks grow: `X.lora_A.<i>`, `X.lora_E.<i>`, `X.lora_B.<i>` are put together in the order of i, and
ΔW = lora_alpha / (ranknum + 1e-5) · B·diag(E)·A. A reserve that never became a component has
E = 0, or what it was given for learning ahead, which the live model computes with too.
"""

from __future__ import annotations

import re

import torch

from ..options import ReadOptions
from ..run import Run
from ..updates.rank_one import RankOneSum
from .lora_reader import Adaptation, CheckpointFiles
from .module import AdaptedModule, grouped
from .run_folder import RunFolder

_PIECE = re.compile(r"(.+)\.(lora_[AEB]\.\d+|ranknum)")


class IncreloraReader:
    """Reads a checkpoint folder."""

    name = "increlora"
    looks_for = "config.json, and a checkpoint whose tensors end in .lora_A.0, .lora_E.0, .lora_B.0"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        tensors = {} if folder.checkpoint is None else folder.checkpoint.tensors
        return folder if any(name.endswith(".lora_E.0") for name in tensors) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = CheckpointFiles(folder)
        alpha = files.alpha(options.lora_alpha)

        def adapt(module: AdaptedModule) -> Adaptation:
            count = _count(module)
            total, shape = _check(module, count)

            def load() -> RankOneSum:
                a = torch.cat([module.load(f"lora_A.{i}") for i in range(count)])
                e = torch.cat([module.load(f"lora_E.{i}").flatten() for i in range(count)])
                b = torch.cat([module.load(f"lora_B.{i}") for i in range(count)], dim=1)
                scale = alpha / (float(module.load("ranknum")) + 1e-5)
                return RankOneSum(a, (e.double() * scale).float(), b)

            return Adaptation(total, load, shape)

        modules, _ = grouped(files.tensors, _PIECE)
        return files.run(self.name, modules, adapt, {"lora_alpha": alpha})


def _count(module: AdaptedModule) -> int:
    """The number of pieces; raises `RunError` when one is missing."""
    count = max(sum(part.startswith("lora_E.") for part in module.parts), 1)
    needed = {f"lora_{letter}.{i}" for letter in "AEB" for i in range(count)} | {"ranknum"}
    if module.parts.keys() != needed:
        raise module.error(
            "the pieces of an adapted module are not complete",
            min(module.parts.keys() ^ needed),
            found=", ".join(sorted(module.parts)),
            expected=f"lora_A, lora_E and lora_B from 0 to {count - 1}, and ranknum",
        )
    return count


def _check(module: AdaptedModule, count: int) -> tuple[int, tuple[int, int]]:
    """The number of stored components, and `[out, in]`; raises `RunError` when the pieces do not
    fit together."""
    module.check_size("ranknum", 1)
    total, out, inn = 0, module.parts["lora_B.0"].shape[:1], module.parts["lora_A.0"].shape[-1:]
    for i in range(count):
        a, b = (module.parts[f"lora_{letter}.{i}"].shape for letter in "AB")
        rank = a[:1]
        if len(a) != 2 or a != rank + inn or b != out + rank:
            raise module.error(
                "the pieces of an adapted module do not fit together",
                f"lora_B.{i}",
                found=f"lora_A.{i} {list(a)}, lora_B.{i} {list(b)}",
                expected=f"{['k', *inn]} and {[*out, 'k']}",
            )
        module.check_size(f"lora_E.{i}", a[0])
        total += a[0]
    return total, (out[0], inn[0])
