"""Experts of mlx-lm where the class holds those of a layer as one parameter, and loading knows no
layers of single experts (Gemma 4, Qwen 3 VL, gpt-oss)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ..model.match import Classes
from ..updates.rank_one import RankOneSum
from ..updates.update import Update

_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,9})\.(gate_proj|up_proj|down_proj)")
_HALVES = ("gate_proj", "up_proj")  # of gate_up_proj


@dataclass(frozen=True)
class Block:
    """The update of one module: how it is loaded, its shape, and the rank it began with."""

    load: Callable[[], Update]
    shape: tuple[int, int]
    rank: int


def as_held(blocks: Mapping[str, Block], known: Classes | None) -> dict[str, Block]:
    """`blocks`, those of single experts as blocks of the parameter that the class has for all."""
    result: dict[str, Block] = {}
    halves: dict[str, tuple[_Held, dict[str, Block]]] = {}
    for name, block in blocks.items():
        match = _EXPERT.fullmatch(name)
        if match is None or known is None or known.module(name) is not None:
            result[name] = block
            continue
        half = match[3] in _HALVES
        own = f"{match[1]}.gate_up_proj" if half else f"{match[1]}.{match[3]}"
        held = _held(own, known)
        if held is None or held.shape != (block.shape[0] * (1 + half), block.shape[1]):
            result[name] = block  # which the class then has not
        else:
            parts = halves.setdefault(f"{own}[{match[2]}]", (held, {}))[1]
            parts[match[3]] = block
    return result | {key: _block(*each) for key, each in halves.items()}


class _Held(NamedTuple):
    """`[out, in]` of an expert in a parameter, however it lies there, and whether the rows of
    gate_proj and up_proj come in turn."""

    shape: tuple[int, int]
    in_turn: bool


def _held(parameter: str, known: Classes) -> _Held | None:
    """None for a parameter that the class has not, or does not say of how it lies."""
    names = known.whole.names
    shape = names.state.get(parameter, ())
    if len(shape) != 3:
        return None
    owner = names.model.get_submodule(parameter.rpartition(".")[0])
    lies = getattr(owner, "is_transposed", None)
    if lies is None:
        return None
    out, inn = (shape[2], shape[1]) if lies else (shape[1], shape[2])
    return _Held((out, inn), not getattr(owner, "is_concatenated", True))


def _block(held: _Held, parts: Mapping[str, Block]) -> Block:
    """All of an expert's rows, of which a half may have no update."""
    rank = sum(part.rank for part in parts.values())
    return Block(partial(_joined, held, parts), held.shape, rank)


def _joined(held: _Held, parts: Mapping[str, Block]) -> RankOneSum:
    found: list[RankOneSum] = []
    for name, part in parts.items():
        update = part.load().components()
        assert update is not None
        half, rows = _HALVES.index(name) if name in _HALVES else 0, part.shape[0]
        place = slice(half, None, 2) if held.in_turn else slice(half * rows, (half + 1) * rows)
        b = torch.zeros(held.shape[0], update.rank)
        b[place if name in _HALVES else slice(None)] = update.b
        found.append(RankOneSum(update.a, update.c, b))
    a, c = torch.cat([each.a for each in found]), torch.cat([each.c for each in found])
    return RankOneSum(a, c, torch.cat([each.b for each in found], dim=1))
