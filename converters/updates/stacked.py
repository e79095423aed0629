"""Updates of parts of one tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rank_one import RankOneSum


@dataclass(frozen=True)
class Stacked:
    """Updates of parts of one tensor: each has its rows of that tensor, in rising order."""

    shape: tuple[int, int]
    parts: tuple[tuple[torch.Tensor, RankOneSum], ...]
    whole: bool = False

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        end = start + rows.shape[0]
        for index, update in self.parts:
            if start <= int(index[-1]) and int(index[0]) < end and update.rank:
                inside = (index >= start) & (index < end)
                delta = (update.b[inside] * update.c) @ update.a
                rows.index_add_(0, index[inside] - start, delta)
        return rows

    def components(self) -> None:
        return None
