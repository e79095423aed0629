"""AdaLoRA adapters as PEFT saves them (huggingface/peft, `src/peft/tuners/adalora/`).

ΔW = lora_alpha / (init_r + 1e-5) · B·diag(E)·A (Zhang et al. 2023, arXiv 2303.10512): the divisor
stays the initial rank. Where ranks were allocated, the stored tensors are cut to them already, and
`rank_pattern` says which of the init_r components they are.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..errors import RunError
from ..options import ReadOptions
from ..run import Run
from .lora_reader import Adaptation, AdapterFiles, LoraFiles
from .module import AdaptedModule, grouped
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_UNALLOCATED = (
    "the run stopped before AdaLoRA allocated ranks: all components are taken as they stand"
)
_LORA = re.compile(r"(.+)\.(?:lora_([AB])|(lora_E))")


class PeftAdaloraReader:
    """Reads an adapter folder."""

    name = "peft_adalora"
    looks_for = f'{CONFIG_FILE} with peft_type "ADALORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if folder.adapter_config.get("peft_type") == "ADALORA" else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = AdapterFiles(folder)
        alpha = files.alpha(options.lora_alpha)
        init_r = int(files.number(("init_r",), options.start_rank, "start_rank"))
        kept = _kept(files)

        def adapt(module: AdaptedModule) -> Adaptation:
            rank = module.pair()
            module.need("lora_E", rank, "lora_A, lora_B and lora_E")
            flags = [True] * init_r if kept is None else kept.get(module.name, [])
            if len(flags) != init_r or sum(flags) != rank:
                raise module.error(
                    "the stored rank differs from the configuration's",
                    "lora_E",
                    found=f"rank {rank}",
                    expected=f"{sum(flags)} of {len(flags)} components kept, of init_r {init_r}",
                    remedy="is this the adapter_config.json of another adapter?",
                )
            return Adaptation(init_r, lambda: module.sum(alpha / (init_r + 1e-5), "lora_E"))

        modules, _ = grouped(files.tensors, _LORA)
        run = files.run(self.name, modules, adapt, {"lora_alpha": alpha, "init_r": init_r})
        return run if kept is not None else replace(run, finished=False, warnings=(_UNALLOCATED,))


def _kept(files: LoraFiles) -> dict[str, list[bool]] | None:
    """Module → which of its components the allocation kept; None before the first allocation."""
    pattern = files.config.get("rank_pattern")
    if not pattern:
        return None
    if not isinstance(pattern, dict) or not all(
        isinstance(kept, list) and all(isinstance(flag, bool) for flag in kept)
        for kept in pattern.values()
    ):
        raise RunError(
            "rank_pattern is not AdaLoRA's",
            file=files.config_path,
            found=str(pattern)[:120],
            expected="a list of booleans for each module",
        )
    return {re.sub(r"\.lora_E(\.\w+)?$", "", name): kept for name, kept in pattern.items()}
