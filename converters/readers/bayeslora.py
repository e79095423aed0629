"""BayesLoRA runs (mercury0100/bayeslora, `bayeslora/hf.py`).

ΔW = (lora_alpha / rank) · B_mu·A_mu with the rank before pruning: the means of the posterior, as
the model computes with sampling off. The file holds neither number. Pruned components are not in
the file; all of a module's may be gone.
"""

from __future__ import annotations

import re

from ..files.tensors import LazyTensors
from ..options import ReadOptions
from ..run import Run
from .lora_reader import Adaptation, CheckpointFiles
from .module import AdaptedModule, grouped
from .run_folder import RunFolder

_PART = re.compile(r"(.+)\.(?:([AB])_mu|((?:rank|A|B)_log_sigma2))")


class BayesLoraReader:
    """Reads a checkpoint folder; needs `lora_alpha` and `start_rank`."""

    name = "bayeslora"
    looks_for = "config.json, and a checkpoint whose tensors end in .A_mu and .B_mu"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        checkpoint = folder.checkpoint
        return folder if checkpoint is not None and _modules(checkpoint.tensors) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        def unwrapped(name: str) -> str:
            """The Hugging Face name: the wrapper keeps the layer it adapts as `base`."""
            module, _, kind = name.rpartition(".base.")
            return f"{module}.{kind}" if module in modules else name

        files = CheckpointFiles(folder, unwrapped)
        modules = _modules(files.tensors)
        alpha = files.alpha(options.lora_alpha)
        initial = files.number(("initial rank",), options.start_rank, "start_rank")

        def adapt(module: AdaptedModule) -> Adaptation:
            rank = _rank(module)
            if rank > initial:
                raise module.error(
                    "the module has more components than the initial rank",
                    "A_mu",
                    found=rank,
                    expected=f"at most {initial}",
                    remedy="is this the `start_rank` of another run?",
                )
            return Adaptation(int(initial), lambda: module.sum(alpha / initial))

        chosen = {"lora_alpha": alpha, "start_rank": initial}
        return files.run(self.name, modules, adapt, chosen)


def _modules(tensors: LazyTensors) -> dict[str, AdaptedModule]:
    modules, _ = grouped(tensors, _PART)
    return {name: module for name, module in modules.items() if module.parts.keys() & {"A", "B"}}


def _rank(module: AdaptedModule) -> int:
    a, b = (module.parts[f].shape if f in module.parts else None for f in "AB")
    if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise module.error(
            "A_mu and B_mu do not fit each other",
            "B_mu",
            found=f"A_mu {a and list(a)}, B_mu {b and list(b)}",
            expected="A_mu [rank, in] and B_mu [out, rank]",
        )
    return a[0]
