"""Experts of mlx-lm where the class holds those of a layer as one parameter, and loading knows no
layers of single experts (Gemma 4, Qwen 3 VL)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ..model.match import Classes
from ..updates.rank_one import RankOneSum
from ..updates.update import Update

_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,9})\.(gate_proj|up_proj|down_proj)")
_HALVES = ("gate_proj", "up_proj")  # of gate_up_proj, one above the other


@dataclass(frozen=True)
class Block:
    """The update of one module: how it is loaded, its shape, and the rank it began with."""

    load: Callable[[], Update]
    shape: tuple[int, int]
    rank: int


def as_held(blocks: Mapping[str, Block], known: Classes | None) -> dict[str, Block]:
    """`blocks`, those of single experts as blocks of the parameter that the class has for all."""
    result: dict[str, Block] = {}
    halves: dict[str, dict[str, Block]] = {}
    for name, block in blocks.items():
        match = _EXPERT.fullmatch(name)
        if match is None or known is None or known.module(name) is not None:
            result[name] = block
            continue
        own = "gate_up_proj" if match[3] in _HALVES else match[3]
        held = known.whole.names.state.get(f"{match[1]}.{own}", ())
        rows = block.shape[0] * (2 if match[3] in _HALVES else 1)
        key = f"{match[1]}.{own}[{match[2]}]"
        if held[1:] != (rows, block.shape[1]):
            result[name] = block  # which the class then has not
        elif match[3] in _HALVES:
            halves.setdefault(key, {})[match[3]] = block
        else:
            result[key] = block
    return result | {key: _above(parts) for key, parts in halves.items()}


def _above(parts: Mapping[str, Block]) -> Block:
    """The rows of gate_proj above those of up_proj, one of which may be missing."""
    rows, columns = next(iter(parts.values())).shape
    load = partial(_joined, parts, rows)
    return Block(load, (2 * rows, columns), sum(block.rank for block in parts.values()))


def _joined(parts: Mapping[str, Block], rows: int) -> RankOneSum:
    found: list[RankOneSum] = []
    for half, name in enumerate(_HALVES):
        update = parts[name].load().components() if name in parts else None
        if update is not None:
            b = torch.zeros(2 * rows, update.rank)
            b[half * rows : (half + 1) * rows] = update.b
            found.append(RankOneSum(update.a, update.c, b))
    a, c = torch.cat([each.a for each in found]), torch.cat([each.c for each in found])
    return RankOneSum(a, c, torch.cat([each.b for each in found], dim=1))
