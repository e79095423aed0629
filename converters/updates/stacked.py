"""Updates of parts of one tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rank_one import RankOneSum
from .update import Update


@dataclass(frozen=True)
class Stacked:
    """Updates of parts of one tensor: each has its rows of that tensor; a sum of components has
    them in rising order."""

    shape: tuple[int, int]
    parts: tuple[tuple[torch.Tensor, Update], ...]

    @property
    def whole(self) -> bool:
        """A part that is no sum of components has all of its rows at once."""
        return any(not isinstance(update, RankOneSum) for _, update in self.parts)

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        end = start + rows.shape[0]
        for index, update in self.parts:
            if not isinstance(update, RankOneSum):
                rows[index] = update.merge(rows[index], 0)
            elif start <= int(index[-1]) and int(index[0]) < end and update.rank:
                inside = (index >= start) & (index < end)
                delta = (update.b[inside] * update.c) @ update.a
                rows.index_add_(0, index[inside] - start, delta)
        return rows

    def components(self) -> None:
        return None
