"""Bayesian-LoRA adapters (Meo et al. 2024, arXiv 2406.13046; KseniaSycheva/peft, `tuners/blora/`).

ΔW = lora_alpha/r · Q(B)·diag(g∘Q(E))·Q(A), with the hard gates of evaluation. `lora_E` is absent
where ranks were not learned (`prune_rank: false`). Q follows `straight_through.py` of the fork,
which never clips: nothing sets its `clip_input`.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite
from ..options import ReadOptions
from ..run import Run
from ..updates.rank_one import RankOneSum
from .lora_reader import Adaptation, AdapterFiles
from .module import AdaptedModule, Modules
from .peft_common import refuse_unread
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_PART = re.compile(r"(.+)\.lora_(A|B|E)")
_STATE = re.compile(r"(.+)\.lora_((?:A|B|E|A_act|E_act|AB_act)_quantizer)\.quantizer\.(\w+)")

# Bits 4, 8, 16 and 32: the gate of each level, and how much finer its step is than the last one.
_LEVELS = {"gamma_4": 5, "gamma_8": 17, "gamma_16": 257, "gamma_32": 65537}
_OFFSET = math.log(0.1 / 1.1) * 2 / 3  # β·ln(−γ/ζ) of the hard concrete distribution
_THRESHOLD = 0.34


class BayesianLoraReader:
    """Reads an adapter folder."""

    name = "bayesian_lora"
    looks_for = f'{CONFIG_FILE} with peft_type "BLORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if folder.adapter_config.get("peft_type") == "BLORA" else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = AdapterFiles(folder)
        alpha = files.alpha(options.lora_alpha)

        def adapt(module: AdaptedModule) -> Adaptation:
            rank = module.pair()
            if files.config.get("r") not in (None, rank):
                raise RunError(
                    "the stored rank differs from the configuration's",
                    file=files.config_path,
                    tensor=module.name,
                    found=f"rank {rank} in the weights",
                    expected=f"r: {files.config['r']}",
                )
            _check_gates(module, rank)
            return Adaptation(rank, lambda: _update(module, alpha / max(1, rank)))

        modules: dict[str, AdaptedModule] = {}
        for name, tensor in files.tensors.items():
            if match := _PART.fullmatch(name):
                part = match[2]
            elif match := _STATE.fullmatch(name):
                part = f"{match[2]}.{match[3]}"
            else:
                continue
            modules.setdefault(match[1], AdaptedModule(match[1])).parts[part] = tensor
        run = files.run(self.name, modules, adapt, {"lora_alpha": alpha})
        refuse_unread(run.replaced, run.files[0], "_quantizer.")
        return replace(run, warnings=(_unmergeable(modules),))


def _check_gates(module: AdaptedModule, rank: int) -> None:
    sizes = {f"{f}_quantizer.{g}": 1 for f in "ABE" if f in module.parts for g in _LEVELS}
    if "E" in module.parts:
        sizes |= {"E": rank, "E_quantizer.gamma_2": rank - 1}
    for part, size in sizes.items():
        if part not in module.parts:
            raise module.error(
                "a gate of the adapter is missing",
                f"lora_{part.replace('.', '.quantizer.')}",
                remedy="was it saved before the first training step? save it again",
            )
        module.check_size(part, size)


def _open(gamma: LazyTensor) -> torch.Tensor:
    """The hard gates of evaluation, bool, in the shape of `gamma`."""
    return torch.sigmoid(_OFFSET - load_finite(gamma)) < _THRESHOLD


def _levels(module: AdaptedModule, quantizer: str) -> int:
    """How many of the levels beyond 2 bits are used: up to the first closed gate."""
    gates = [bool(_open(module.parts[f"{quantizer}.{gate}"])) for gate in _LEVELS]
    return [*gates, False].index(False)


def _update(module: AdaptedModule, scale: float) -> RankOneSum:
    a, b = _quantized(module, "A"), _quantized(module, "B")
    c = torch.ones(a.shape[0])
    if "E" in module.parts:
        gates = _open(module.parts["E_quantizer.gamma_2"]).flatten().cumprod(0)
        c = _quantized(module, "E").flatten() * torch.cat([c[:1], gates])
    return RankOneSum(a, (c.double() * scale).float(), b)


def _quantized(module: AdaptedModule, factor: str) -> torch.Tensor:
    """Q(x) = x₂ + x₄ + x₈ + …, each a rounding of what the ones before left, float32."""
    x, levels = module.load(factor), _levels(module, f"{factor}_quantizer")
    step = _step(module, f"{factor}_quantizer")
    if step is None and levels == len(_LEVELS):
        return x  # 32 bits: Q(x) is x, whatever the step
    if step is None or not bool(step):
        raise module.error(
            "the range of a quantized factor is not known",
            f"lora_{factor}_quantizer.quantizer",
            found=f"a quantizer of {2 ** (levels + 1)} bits without a step",
            expected="s_2, or x_min and x_max",
            remedy="add x_min and x_max of the live model's quantizers to the adapter's weights "
            "(layers built without learned_scale do not save them)",
        )
    pieces = [step * torch.round(x / step)]
    for finer in list(_LEVELS.values())[:levels]:
        x, step = x - pieces[-1], step / finer
        pieces.append(step * torch.round(x / step))
    total = pieces.pop()
    while pieces:  # in the fork's order of additions
        total = pieces.pop() + total
    return total


def _step(module: AdaptedModule, quantizer: str) -> torch.Tensor | None:
    """The step s₂ of 2 bits `[1]`: learned itself, or by the learned range."""
    if f"{quantizer}.s_2" in module.parts:
        return module.load(f"{quantizer}.s_2")
    if not {f"{quantizer}.x_min", f"{quantizer}.x_max"} <= module.parts.keys():
        return None
    low, high = (module.load(f"{quantizer}.x_{end}") for end in ("min", "max"))
    if bool(high > 0):
        return (high + high if bool(low < 0) else high) / 3
    return (-low - low) / 3


def _unmergeable(modules: Modules) -> str:
    coarse = sum(
        any(
            _levels(module, quantizer) < len(_LEVELS)
            for quantizer in ("A_act_quantizer", "E_act_quantizer", "AB_act_quantizer")
            if all(f"{quantizer}.{gate}" in module.parts for gate in _LEVELS)
        )
        for module in modules.values()
    )
    warning = (
        "Bayesian-LoRA also quantizes activations, which are no part of a weight, and base "
        "weights, whose gates it does not save: both stay unquantized here"
    )
    if coarse:
        warning += (
            f"; the live model differs, as {coarse} of {len(modules)} modules have activations "
            "of less than 32 bits"
        )
    return warning
