"""LoRA with a gate for each component: ΔW = (lora_alpha / start rank) · B·diag(gate)·A.

ALoRA (Liu et al. 2024, arXiv 2403.16187) ends with gates of 0 and 1; SoRA (Ding et al. 2023,
arXiv 2311.11696; TsinghuaC3I/SoRA, `src/lora.py`) with sparse ones. The gate is whatever vector of
r numbers lies beside lora_A and lora_B, in an adapter folder or a full checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import RunError
from ..files.tensors import LazyTensors, numel
from ..options import ReadOptions
from ..run import Run
from .lora_reader import Adaptation, AdapterFiles, CheckpointFiles, LoraFiles
from .module import AdaptedModule, Modules, adapted
from .peft_common import is_variant
from .run_folder import CONFIG_FILE, RunFolder

GATES = ("gate", "lora_gate", "alpha", "lora_scaler")
_TYPES = (None, "LORA", "ALORA", "SORA")
_SORA = ".lora"  # SoRA keeps factors and gate in a module of their own below the layer
_UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora")


class GatedLoraReader:
    """Reads an adapter folder or a checkpoint folder."""

    name = "gated"
    looks_for = "a vector of r numbers beside each lora_A and lora_B, in an adapter or checkpoint"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if _candidates(adapted(_tensors(folder))) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        checkpoint = not folder.has(CONFIG_FILE)
        files: LoraFiles = CheckpointFiles(folder) if checkpoint else AdapterFiles(folder)
        for key in _UNREAD:
            if files.config.get(key):
                raise RunError(
                    f"{key} is not read for gated LoRA",
                    file=files.config_path,
                    found=f"{key}: {files.config[key]}",
                )
        alpha = files.alpha(options.lora_alpha)
        found = adapted(_tensors(folder))
        modules = {}
        for name, module in found.items():
            own = name.removesuffix(_SORA)
            modules[own] = replace(module, name=own)
        start = None
        if not all(name.endswith(_SORA) for name in found):  # SoRA never cuts what it stores
            start = int(files.number(("r", "lora_r"), options.start_rank, "start_rank"))
        gate = _gate(modules, files, options.gate)

        def adapt(module: AdaptedModule) -> Adaptation:
            rank = module.pair()
            module.need(gate, rank, f"lora_A, lora_B and {gate}")
            first = rank if start is None else start
            return Adaptation(first, lambda: module.sum(alpha / max(1, first), gate))

        return files.run(self.name, modules, adapt, {"lora_alpha": alpha, "gate": gate})


def _tensors(folder: RunFolder) -> LazyTensors:
    """The tensors that may be a gated run's, none where another method claims the folder."""
    if folder.has(CONFIG_FILE):
        config = folder.adapter_config  # a magnitude may have r numbers too
        plain = not config.get("use_dora") and not is_variant(config)
        plain = plain and "init_r" not in config  # AdaLoRA's, whatever type it says
        own = config.get("peft_type") in _TYPES and plain
        return folder.adapter if own and folder.adapter_file is not None else {}
    tensors = {} if folder.checkpoint is None else folder.checkpoint.tensors
    # E in a checkpoint is AdaLoRA, whose scale has another divisor.
    return {} if any(name.endswith(".lora_E") for name in tensors) else tensors


def _candidates(modules: Modules) -> list[str]:
    """What may be the gate: tensors of a known name, or the only one, where it has r numbers."""
    others = {part for module in modules.values() for part in module.parts} - {"A", "B"}
    known = sorted(others.intersection(GATES))
    if known or len(others) != 1:
        return known
    name = others.pop()
    fits = any(
        module.parts["A"].shape[:1] == (numel(module.parts[name]),)
        for module in modules.values()
        if module.parts.keys() >= {"A", name}
    )
    return [name] if fits else []


def _gate(modules: Modules, files: LoraFiles, said: str | None) -> str:
    candidates = _candidates(modules)
    if said is None and len(candidates) == 1:
        return candidates[0]
    if said is None or not any(said in module.parts for module in modules.values()):
        raise RunError(
            "it is not known which tensor is the gate",
            file=files.config_path.parent,
            found=", ".join(candidates),
            expected=said or "one vector of r numbers beside lora_A and lora_B",
            remedy="pass `gate` with the name of the vector",
        )
    return said
