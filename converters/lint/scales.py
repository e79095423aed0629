"""Checks of ranks and scales: does each engine multiply B·A by what PEFT does?"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from functools import partial

from ..readers import is_number
from ..readers.peft_common import ATTENTION_OUT
from ..targets.engines import Profile, Reading
from ..targets.lora_folder import CONFIG
from .finding import AGAIN, PEFTS_OWN, Adapter, Finding

_DEFAULT = 8  # what r and lora_alpha are in PEFT where the configuration lacks them
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def numbers(adapter: Adapter) -> Iterator[Finding]:
    for key in ("r", "lora_alpha") if adapter.is_lora else ():
        value = adapter.config.get(key)
        if is_number(value) and (value > 0 or (value < 0 and key == "lora_alpha")):
            continue
        taken = PEFTS_OWN if key not in adapter.config else ()
        for severity, targets in adapter.graded(partial(_lacks, taken)):
            yield Finding(
                "no-scale", severity, targets, f"{CONFIG}: {key}",
                f"{key} is missing or zero"
                if severity == "error"
                else f"{key} is missing, and PEFT takes {_DEFAULT}",
                str(value), "a number", f"set {key} to what training used",
            )  # fmt: skip


def _lacks(taken: Collection[str], engine: Profile) -> bool:
    return engine.name not in taken


def stored_ranks(adapter: Adapter) -> Iterator[Finding]:
    for module, (a, b) in adapter.pairs.items():
        convolution = len(a.shape) == len(b.shape) > 2 and set(b.shape[2:]) == {1}
        plain = len(a.shape) == len(b.shape) == 2
        deaf = adapter.where(lambda engine: not engine.convolutions)
        if convolution and deaf:
            yield Finding(
                "convolution",
                "error",
                deaf,
                module,
                "the engine loads no adapters on convolutions",
                str(list(a.shape)),
                "adapters on linear layers",
                "deploy the merged model (`merge`)",
            )
        fit = (plain or convolution) and a.shape[0] in (b.shape[1], b.shape[1] * adapter.blocks)
        if not fit:
            yield Finding(
                "pair-rank", "error", adapter.all, f"{module}.lora_B",
                "A and B are of different rank", str(list(b.shape)), f"[out, {a.shape[0]}]", AGAIN,
            )  # fmt: skip
            continue
        said = _pattern(adapter, "rank_pattern", module, "r")
        if said is not None and said != a.shape[0]:
            yield Finding(
                "config-rank", "error", adapter.all, module,
                "the stored rank is not the configuration's", f"rank {a.shape[0]}",
                f"rank {said:g} by r and rank_pattern",
                "is this the adapter_config.json of another adapter?",
            )  # fmt: skip


def limits(adapter: Adapter) -> Iterator[Finding]:
    if not adapter.ranks:
        return
    module = max(adapter.ranks, key=lambda name: adapter.ranks[name])
    rank = adapter.ranks[module]
    for engine in adapter.engines:
        if engine.max_rank is not None and rank > engine.max_rank:
            yield Finding(
                "limit", "error", (engine.name,), module, "the rank is over the engine's limit",
                f"rank {rank}", f"at most {engine.max_rank}",
                f"`adapter` with `max_rank` {engine.max_rank}, or merge it",
            )  # fmt: skip
        elif engine.slots:
            slot = min(slot for slot in engine.slots if slot >= rank)
            yield Finding(
                "slot", "info", (engine.name,), module,
                "the smallest setting that takes this adapter", f"rank {rank}",
                f"--max-lora-rank {slot}", "start the engine with it",
            )  # fmt: skip


def uniform(adapter: Adapter) -> Iterator[Finding]:
    default = adapter.config.get("r")
    for engine in (engine for engine in adapter.engines if engine.uniform):
        for module, rank in adapter.ranks.items():
            if rank != default:
                yield Finding(
                    "one-rank", "error", (engine.name,), module,
                    "the engine holds one rank for all modules", f"rank {rank}",
                    f"rank {default}, the configuration's r",
                    f"`lint` with `target` {engine.name} and `fix` pads to the largest rank",
                )  # fmt: skip


def scales(adapter: Adapter) -> Iterator[Finding]:
    truth = _truth(adapter)
    for engine in adapter.engines:
        yield from _compare(adapter, engine, truth, engine.name, engine.reading)
        for versions, reading in engine.older.items():
            yield from _compare(adapter, engine, truth, versions, reading)


def _compare(
    adapter: Adapter, engine: Profile, truth: dict[str, float], reader: str, reading: Reading
) -> Iterator[Finding]:
    for module, expected in truth.items():
        found = _scale(adapter, module, reading)
        if found is not None and not math.isclose(found, expected, rel_tol=1e-6):
            yield Finding(
                "scale", "error" if reader == engine.name else "warning", (engine.name,), module,
                f"{reader} multiplies by another scale than PEFT", f"{found:g}", f"{expected:g}",
                _fold(engine.name),
            )  # fmt: skip


def fused(adapter: Adapter) -> Iterator[Finding]:
    truth = _truth(adapter)
    targets = adapter.where(lambda engine: bool(engine.older))
    for group in _FUSED if targets else ():
        for module in truth:
            stem, _, kind = module.rpartition(".")
            if kind != group[0]:
                continue
            parts = {k: truth[f"{stem}.{k}"] for k in group if f"{stem}.{k}" in truth}
            if any(not math.isclose(scale, truth[module]) for scale in parts.values()):
                yield Finding(
                    "fused", "warning", targets, module,
                    "the engine runs these modules as one layer, and their scales differ",
                    ", ".join(f"{k} {scale:g}" for k, scale in parts.items()), "one scale",
                    _fold(targets[0]),
                )  # fmt: skip


def _fold(engine: str) -> str:
    return f"`lint` with `target` {engine} and `fix` folds every scale into the weights"


def _truth(adapter: Adapter) -> dict[str, float]:
    """PEFT's scale of every module; none where the configuration does not say it."""
    peft = Reading(patterns=True, rslora=True)
    scales = {module: _scale(adapter, module, peft) for module in adapter.ranks}
    return {module: scale for module, scale in scales.items() if scale is not None}


def _scale(adapter: Adapter, module: str, reading: Reading) -> float | None:
    rank = alpha = None
    if reading.patterns:
        rank = _pattern(adapter, "rank_pattern", module, "r")
        alpha = _pattern(adapter, "alpha_pattern", module, "lora_alpha")
    else:
        r, a = (adapter.config.get(key, _DEFAULT) for key in ("r", "lora_alpha"))
        rank, alpha = (r if is_number(r) else None), (a if is_number(a) else None)
    if reading.stored_rank:
        rank = adapter.ranks[module]
    if not rank or rank < 0 or not alpha:
        return None
    rslora = reading.rslora and bool(adapter.config.get("use_rslora"))
    return alpha / (math.sqrt(rank) if rslora else rank)


def _pattern(adapter: Adapter, key: str, module: str, default: str) -> float | None:
    patterns, module = adapter.config.get(key), module.removesuffix(ATTENTION_OUT)
    for name, value in (patterns if isinstance(patterns, dict) else {}).items():
        if adapter.patterns.suffix(name, module) and is_number(value):
            return value
    value = adapter.config.get(default, _DEFAULT)
    return value if is_number(value) else None


CHECKS = (numbers, stored_ranks, limits, uniform, scales, fused)
