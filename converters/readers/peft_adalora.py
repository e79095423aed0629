"""AdaLoRA adapters as PEFT saves them (huggingface/peft, `src/peft/tuners/adalora/`).

ΔW = lora_alpha / (init_r + 1e-5) · B·diag(E)·A (Zhang et al. 2023, arXiv 2303.10512): the divisor
stays the initial rank. Where ranks were allocated, the stored tensors are cut to them already, and
`rank_pattern` says which of the init_r components they are.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import RunError
from ..run import Run
from . import ReadOptions
from .checkpoint import Parts, adapter_run, check_size, number, weighted
from .peft_common import CONFIG_FILE, WEIGHT_FILES, check_pair, grouped, open_weights, read_config

_UNALLOCATED = (
    "the run stopped before AdaLoRA allocated ranks: all components are taken as they stand"
)
_LORA = re.compile(r"(.+)\.lora_([ABE])")


class PeftAdaloraReader:
    """Reads an adapter folder."""

    name = "peft_adalora"
    looks_for = f'{CONFIG_FILE} with peft_type "ADALORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, path: Path) -> Path | None:
        return path if read_config(path).get("peft_type") == "ADALORA" else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        config_path, config = folder / CONFIG_FILE, read_config(folder)
        alpha = number(config, config_path, ("lora_alpha",), options.lora_alpha, "lora_alpha")
        init_r = number(config, config_path, ("init_r",), options.start_rank, "start_rank")
        kept = _kept(config, config_path)
        modules, _ = grouped(open_weights(folder)[1], _LORA)
        for module, parts in modules.items():
            _check(module, parts, int(init_r), kept)
        run = adapter_run(
            folder,
            self.name,
            modules,
            {m: partial(weighted, p, "E", alpha / (init_r + 1e-5)) for m, p in modules.items()},
            dict.fromkeys(modules, int(init_r)),
            {"lora_alpha": alpha, "init_r": init_r},
        )
        return run if kept is not None else replace(run, finished=False, warnings=(_UNALLOCATED,))


def _kept(config: dict[str, object], path: Path) -> dict[str, list[bool]] | None:
    """Module → which of its components the allocation kept; None before the first allocation."""
    pattern = config.get("rank_pattern")
    if not pattern:
        return None
    if not isinstance(pattern, dict) or not all(
        isinstance(kept, list) and all(isinstance(flag, bool) for flag in kept)
        for kept in pattern.values()
    ):
        raise RunError(
            "rank_pattern is not AdaLoRA's",
            file=path,
            found=str(pattern)[:120],
            expected="a list of booleans for each module",
        )
    return {re.sub(r"\.lora_E(\.\w+)?$", "", name): kept for name, kept in pattern.items()}


def _check(module: str, parts: Parts, init_r: int, kept: dict[str, list[bool]] | None) -> None:
    file = next(iter(parts.values())).path
    if "E" not in parts:
        raise RunError(
            "an adapted module is incomplete",
            file=file,
            tensor=f"{module}.lora_E",
            found=", ".join(f"lora_{part}" for part in sorted(parts)),
            expected="lora_A, lora_B and lora_E",
        )
    rank = check_pair(module, parts, file)
    check_size(module, "lora_E", parts["E"], rank)
    flags = [] if kept is None else kept.get(module, [])
    size, alive = (init_r, init_r) if kept is None else (len(flags), sum(flags))
    if size != init_r or alive != rank:
        raise RunError(
            "the stored rank differs from the configuration's",
            file=file,
            tensor=f"{module}.lora_E",
            found=f"rank {rank}",
            expected=f"{alive} of {size} components kept, of init_r {init_r}",
            remedy="is this the adapter_config.json of another adapter?",
        )
