"""AFLoRA adapters, of both forks of PEFT in zeyuliu1037/AFLoRA (Liu et al. 2024,
arXiv 2403.13269).

`gsm8k/peft` (`lora_type: "aflora"`): ΔW = (lora_alpha / r) · diag(db)·B·diag(d)·A. `glue/peft`
(mode "elora"): ΔW = diag(db)·B·diag(f(d))·A with f by the run's `nonlin`, which that fork does not
store. With its `identity_init` the initial factors are subtracted, which it does not store either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from ..errors import RunError
from ..files.tensors import load_finite
from ..run import Run
from ..updates.rank_one import RankOneSum
from . import ReadOptions
from .checkpoint import Parts, adapted, adapter_run, check_size, number
from .peft_common import CONFIG_FILE, WEIGHT_FILES, check_pair, open_weights, read_config

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


class AfloraReader:
    """Reads an adapter folder."""

    name = "aflora"
    looks_for = f"{CONFIG_FILE}, and {' or '.join(WEIGHT_FILES)} with tensors .lora_d and .lora_db"

    def detect(self, path: Path) -> Path | None:
        stored = any((path / name).is_file() for name in WEIGHT_FILES)
        own = stored and read_config(path).get("peft_type") == "LORA"
        found = own and any(name.endswith(".lora_db") for name in open_weights(path)[1])
        return path if found else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        config, path = read_config(folder), folder / CONFIG_FILE
        modules = adapted(open_weights(folder)[1])
        ranks = {module: _check(module, parts) for module, parts in modules.items()}
        chosen: dict[str, object]
        if config.get("lora_type") == "aflora":
            alpha = number(config, path, ("lora_alpha",), options.lora_alpha, "lora_alpha")
            function, chosen = _FUNCTIONS[0], {"lora_alpha": alpha}
        else:
            alpha, nonlin = None, _nonlin(config, path)
            function, chosen = _FUNCTIONS[nonlin], {"nonlin": nonlin}
        updates = {
            module: partial(
                _load, parts, function, 1.0 if alpha is None else alpha / max(1, ranks[module])
            )
            for module, parts in modules.items()
        }
        return adapter_run(folder, self.name, modules, updates, ranks, chosen)


def _nonlin(config: dict[str, object], path: Path) -> int:
    if config.get("identity"):
        raise RunError(
            "runs with identity_init cannot be read: their initial factors are not stored",
            file=path,
            found=f"identity: {config['identity']}",
        )
    value = config.get("nonlin")
    if type(value) is not int or not 0 <= value < len(_FUNCTIONS):
        raise RunError(
            "the run's nonlin is not known",
            file=path,
            found=value,
            expected=f"nonlin from 0 to {len(_FUNCTIONS) - 1}",
            remedy=f'write "nonlin": N into {path.name}, as the run was given it '
            "(0 in the authors' scripts)",
        )
    return value


def _check(module: str, parts: Parts) -> int:
    file = next(iter(parts.values())).path
    rank = check_pair(module, parts, file)
    for part, size in (("lora_d", rank), ("lora_db", parts["B"].shape[0])):
        if part not in parts:
            raise RunError(
                "an adapted module is incomplete",
                file=file,
                tensor=f"{module}.{part}",
                found=", ".join(sorted(parts)),
                expected="lora_A, lora_B, lora_d and lora_db",
            )
        check_size(module, part, parts[part], size)
    return rank


def _load(parts: Parts, function: _Function, scale: float) -> RankOneSum:
    a, b, d, db = (load_finite(parts[part]) for part in ("A", "B", "lora_d", "lora_db"))
    c = function(d.double()) * scale
    return RankOneSum(a, c.float(), (b.double() * db.double().unsqueeze(1)).float())
