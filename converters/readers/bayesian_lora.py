"""Bayesian-LoRA adapters (Meo et al. 2024, arXiv 2406.13046; KseniaSycheva/peft, `tuners/blora/`).

ΔW = lora_alpha/r · Q(B)·diag(g∘Q(E))·Q(A), with the hard gates of evaluation. `lora_E` is absent
where ranks were not learned (`prune_rank: false`). Q follows `straight_through.py` of the fork,
which never clips: nothing sets its `clip_input`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite
from ..run import Run
from ..updates.rank_one import RankOneSum
from . import ReadOptions
from .checkpoint import Parts, adapter_run, check_size, number
from .peft_common import CONFIG_FILE, WEIGHT_FILES, check_pair, open_weights, read_config

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

    def detect(self, path: Path) -> Path | None:
        return path if read_config(path).get("peft_type") == "BLORA" else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        config = read_config(folder)
        file, tensors = open_weights(folder)
        path = file.parent / CONFIG_FILE
        alpha = number(config, path, ("lora_alpha",), options.lora_alpha, "lora_alpha")
        modules: dict[str, Parts] = {}
        for name, tensor in tensors.items():
            if match := _PART.fullmatch(name):
                modules.setdefault(match[1], {})[match[2]] = tensor
            elif match := _STATE.fullmatch(name):
                modules.setdefault(match[1], {})[f"{match[2]}.{match[3]}"] = tensor
        updates: dict[str, Callable[[], RankOneSum]] = {}
        start_rank = {}
        for module, parts in modules.items():
            rank = start_rank[module] = check_pair(module, parts, file)
            if config.get("r") not in (None, rank):
                raise RunError(
                    "the stored rank differs from the configuration's",
                    file=path,
                    tensor=module,
                    found=f"rank {rank} in the weights",
                    expected=f"r: {config['r']}",
                )
            _check_gates(module, parts, rank, file)
            updates[module] = _loader(module, parts, alpha / max(1, rank))
        run = adapter_run(folder, self.name, modules, updates, start_rank, {"lora_alpha": alpha})
        for name in run.replaced:
            if "lora_" in name or "_quantizer." in name:
                raise RunError(
                    "a part of the adapter that this reader does not read", file=file, tensor=name
                )
        return replace(run, warnings=(_unmergeable(modules),))


def _check_gates(module: str, parts: Parts, rank: int, file: Path) -> None:
    sizes = {f"{f}_quantizer.{g}": 1 for f in "ABE" if f in parts for g in _LEVELS}
    if "E" in parts:
        sizes |= {"E": rank, "E_quantizer.gamma_2": rank - 1}
    for part, size in sizes.items():
        if part not in parts:
            raise RunError(
                "a gate of the adapter is missing",
                file=file,
                tensor=f"{module}.lora_{part.replace('.', '.quantizer.')}",
                remedy="was it saved before the first training step? save it again",
            )
        check_size(module, f"lora_{part}", parts[part], size)


def _open(gamma: LazyTensor) -> torch.Tensor:
    """The hard gates of evaluation, bool, in the shape of `gamma`."""
    return torch.sigmoid(_OFFSET - load_finite(gamma)) < _THRESHOLD


def _levels(parts: Parts, quantizer: str) -> int:
    """How many of the levels beyond 2 bits are used: up to the first closed gate."""
    gates = [bool(_open(parts[f"{quantizer}.{gate}"])) for gate in _LEVELS]
    return [*gates, False].index(False)


def _loader(module: str, parts: Parts, scale: float) -> Callable[[], RankOneSum]:
    def load() -> RankOneSum:
        a, b = _quantized(module, parts, "A"), _quantized(module, parts, "B")
        c = torch.ones(a.shape[0])
        if "E" in parts:
            gates = _open(parts["E_quantizer.gamma_2"]).flatten().cumprod(0)
            c = _quantized(module, parts, "E").flatten() * torch.cat([c[:1], gates])
        return RankOneSum(a, (c.double() * scale).float(), b)

    return load


def _quantized(module: str, parts: Parts, factor: str) -> torch.Tensor:
    """Q(x) = x₂ + x₄ + x₈ + …, each a rounding of what the ones before left, float32."""
    x, levels = load_finite(parts[factor]), _levels(parts, f"{factor}_quantizer")
    step = _step(parts, f"{factor}_quantizer")
    if step is None and levels == len(_LEVELS):
        return x  # 32 bits: Q(x) is x, whatever the step
    if step is None or not bool(step):
        raise RunError(
            "the range of a quantized factor is not known",
            file=parts[factor].path,
            tensor=f"{module}.lora_{factor}_quantizer.quantizer",
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


def _step(parts: Parts, quantizer: str) -> torch.Tensor | None:
    """The step s₂ of 2 bits `[1]`: learned itself, or by the learned range."""
    if f"{quantizer}.s_2" in parts:
        return load_finite(parts[f"{quantizer}.s_2"])
    if not {f"{quantizer}.x_min", f"{quantizer}.x_max"} <= parts.keys():
        return None
    low, high = (load_finite(parts[f"{quantizer}.x_{end}"]) for end in ("min", "max"))
    if bool(high > 0):
        return (high + high if bool(low < 0) else high) / 3
    return (-low - low) / 3


def _unmergeable(modules: dict[str, Parts]) -> str:
    coarse = sum(
        any(
            _levels(parts, quantizer) < len(_LEVELS)
            for quantizer in ("A_act_quantizer", "E_act_quantizer", "AB_act_quantizer")
            if all(f"{quantizer}.{gate}" in parts for gate in _LEVELS)
        )
        for parts in modules.values()
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
