"""Pairs of LoRA for rows of one weight, where a trainer keeps apart what transformers stores as one
(queries, keys and values; gate and up)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import RunError
from ..updates.rank_one import RankOneSum

MOST = 1 << 24  # rows of one weight


def count(config: Mapping[str, object], key: str, file: Path) -> int:
    """A number of rows, heads or groups in the configuration of a model. Raises `RunError` for what
    is none."""
    value = config.get(key)
    if type(value) is not int or not 0 < value < MOST:
        raise RunError("not a number of a model", file=file, found=f"{key}: {value}")
    return value


def for_rows(out: int, parts: Sequence[tuple[torch.Tensor, RankOneSum]]) -> RankOneSum:
    """The update `[out, in]` that adds each part, `[n, in]`, to the rows `[n]` beside it."""
    b = torch.zeros(out, sum(part.rank for _, part in parts))
    first = 0
    for rows, part in parts:
        b[rows, first : first + part.rank] = part.b
        first += part.rank
    a, c = (torch.cat([getattr(part, name) for _, part in parts]) for name in ("a", "c"))
    return RankOneSum(a, c, b)
