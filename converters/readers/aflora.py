"""AFLoRA adapters, of both forks of PEFT in zeyuliu1037/AFLoRA (Liu et al. 2024,
arXiv 2403.13269).

`gsm8k/peft` (`lora_type: "aflora"`): ΔW = (lora_alpha / r) · diag(db)·B·diag(d)·A. `glue/peft`
(mode "elora"): ΔW = diag(db)·B·diag(f(d))·A with f by the run's `nonlin`, which that fork does not
store. With its `identity_init` the initial factors are subtracted, which it does not store either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ..errors import RunError
from ..options import ReadOptions
from ..run import Run
from ..updates.rank_one import RankOneSum
from .lora_reader import Adaptation, AdapterFiles, LoraFiles
from .module import AdaptedModule, adapted
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_Function = Callable[[torch.Tensor], torch.Tensor]

# `nonlin` of glue/peft/src/peft/tuners/lora.py.
_FUNCTIONS: tuple[_Function, ...] = (
    torch.clone,
    torch.relu,
    torch.abs,
    functional.softplus,
    functional.gelu,
    torch.tanh,
    torch.sigmoid,
)
_PARTS = "lora_A, lora_B, lora_d and lora_db"


class AfloraReader:
    """Reads an adapter folder."""

    name = "aflora"
    looks_for = f"{CONFIG_FILE}, and {' or '.join(WEIGHT_FILES)} with tensors .lora_d and .lora_db"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        own = folder.adapter_config.get("peft_type") == "LORA" and folder.adapter_file is not None
        return folder if own and any(n.endswith(".lora_db") for n in folder.adapter) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = AdapterFiles(folder)
        alpha, function = None, _FUNCTIONS[0]
        chosen: dict[str, object]
        if files.config.get("lora_type") == "aflora":
            alpha = files.alpha(options.lora_alpha)
            chosen = {"lora_alpha": alpha}
        else:
            nonlin = _nonlin(files)
            function, chosen = _FUNCTIONS[nonlin], {"nonlin": nonlin}

        def adapt(module: AdaptedModule) -> Adaptation:
            rank = module.pair()
            module.need("lora_d", rank, _PARTS)
            module.need("lora_db", module.shape[0], _PARTS)

            def load() -> RankOneSum:
                scale = 1.0 if alpha is None else alpha / max(1, rank)
                a, b, d, db = (module.load(part) for part in ("A", "B", "lora_d", "lora_db"))
                c = function(d.double()) * scale
                return RankOneSum(a, c.float(), (b.double() * db.double().unsqueeze(1)).float())

            return Adaptation(rank, load)

        return files.run(self.name, adapted(files.tensors), adapt, chosen)


def _nonlin(files: LoraFiles) -> int:
    if files.config.get("identity"):
        raise RunError(
            "runs with identity_init cannot be read: their initial factors are not stored",
            file=files.config_path,
            found=f"identity: {files.config['identity']}",
        )
    value = files.config.get("nonlin")
    if type(value) is not int or not 0 <= value < len(_FUNCTIONS):
        raise RunError(
            "the run's nonlin is not known",
            file=files.config_path,
            found=value,
            expected=f"nonlin from 0 to {len(_FUNCTIONS) - 1}",
            remedy=f'write "nonlin": N into {CONFIG_FILE}, as the run was given it '
            "(0 in the authors' scripts)",
        )
    return value
