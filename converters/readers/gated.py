"""LoRA with a gate for each component: ΔW = (lora_alpha / start rank) · B·diag(gate)·A.

ALoRA (Liu et al. 2024, arXiv 2403.16187) ends with gates of 0 and 1; SoRA (Ding et al. 2023,
arXiv 2311.11696; TsinghuaC3I/SoRA, `src/lora.py`) with sparse ones. The gate is whatever vector of
r numbers lies beside lora_A and lora_B, in an adapter folder or a full checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ..errors import RunError
from ..files.tensors import LazyTensors, numel
from ..run import Run
from . import ReadOptions
from .checkpoint import (
    Parts,
    adapted,
    adapter_run,
    check_size,
    checkpoint_run,
    number,
    open_checkpoint,
    weighted,
)
from .peft_common import CONFIG_FILE, WEIGHT_FILES, check_pair, open_weights, read_config

GATES = ("gate", "lora_gate", "alpha", "lora_scaler")
_TYPES = (None, "LORA", "ALORA", "SORA")
_SORA = ".lora"  # SoRA keeps factors and gate in a module of their own below the layer
_UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora", "kasa_config")


class GatedLoraReader:
    """Reads an adapter folder or a checkpoint folder."""

    name = "gated"
    looks_for = "a vector of r numbers beside each lora_A and lora_B, in an adapter or checkpoint"

    def detect(self, path: Path) -> Path | None:
        return path if _candidates(adapted(_tensors(path))) else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        checkpoint = None if (folder / CONFIG_FILE).is_file() else open_checkpoint(folder)
        config: Mapping[str, object] = (
            read_config(folder) if checkpoint is None else checkpoint.config
        )
        path = folder / (CONFIG_FILE if checkpoint is None else "config.json")
        for key in _UNREAD:
            if config.get(key):
                raise RunError(
                    f"{key} is not read for gated LoRA", file=path, found=f"{key}: {config[key]}"
                )
        alpha = number(config, path, ("lora_alpha",), options.lora_alpha, "lora_alpha")
        found = adapted(_tensors(folder))
        modules = {name.removesuffix(_SORA): parts for name, parts in found.items()}
        ranks = {
            name: check_pair(name, parts, next(iter(parts.values())).path)
            for name, parts in modules.items()
        }
        if all(name.endswith(_SORA) for name in found):
            start_rank = ranks  # SoRA never cuts what it stores
        else:
            start = number(config, path, ("r", "lora_r"), options.start_rank, "start_rank")
            start_rank = dict.fromkeys(modules, int(start))
        gate = _gate(modules, path, options.gate)
        for name, parts in modules.items():
            _check_gate(name, parts, gate)
        updates = {
            name: partial(weighted, parts, gate, alpha / start_rank[name])
            for name, parts in modules.items()
        }
        chosen = {"lora_alpha": alpha, "gate": gate}
        if checkpoint is None:
            return adapter_run(folder, self.name, modules, updates, start_rank, chosen)
        return checkpoint_run(checkpoint, self.name, modules, updates, start_rank, chosen)


def _tensors(folder: Path) -> LazyTensors:
    """The tensors that may be a gated run's, none where another method claims the folder."""
    if (folder / CONFIG_FILE).is_file():
        own = read_config(folder).get("peft_type") in _TYPES
        weights = any((folder / name).is_file() for name in WEIGHT_FILES)
        return open_weights(folder)[1] if own and weights else {}
    checkpoint = open_checkpoint(folder)
    if checkpoint is None or any(name.endswith(".lora_E") for name in checkpoint.tensors):
        return {}  # E in a checkpoint is AdaLoRA, whose scale has another divisor
    return checkpoint.tensors


def _candidates(modules: Mapping[str, Parts]) -> list[str]:
    """What may be the gate: tensors of a known name, or the only one, where it has r numbers."""
    others = {part for parts in modules.values() for part in parts} - {"A", "B"}
    known = sorted(others.intersection(GATES))
    if known or len(others) != 1:
        return known
    name = others.pop()
    fits = any(
        numel(parts[name]) == parts["A"].shape[0]
        for parts in modules.values()
        if "A" in parts and name in parts
    )
    return [name] if fits else []


def _gate(modules: Mapping[str, Parts], path: Path, said: str | None) -> str:
    candidates = _candidates(modules)
    if said is None and len(candidates) == 1:
        return candidates[0]
    if said is None or not any(said in parts for parts in modules.values()):
        raise RunError(
            "it is not known which tensor is the gate",
            file=path.parent,
            found=", ".join(candidates),
            expected=said or "one vector of r numbers beside lora_A and lora_B",
            remedy="pass `gate` with the name of the vector",
        )
    return said


def _check_gate(module: str, parts: Parts, gate: str) -> None:
    if gate not in parts:
        raise RunError(
            "an adapted module is incomplete",
            file=parts["A"].path,
            tensor=f"{module}.{gate}",
            found=", ".join(sorted(parts)),
            expected=f"lora_A, lora_B and {gate}",
        )
    check_size(module, gate, parts[gate], parts["A"].shape[0])
