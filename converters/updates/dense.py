"""An update ΔW that is a matrix and not a sum of few rank-1 components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DenseUpdate:
    """W' = W + ΔW. `rows(start, stop)` computes rows of ΔW, float32 `[stop - start, in]`."""

    shape: tuple[int, int]
    rows: Callable[[int, int], torch.Tensor]
    whole: bool = False

    def components(self) -> None:
        return None

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return rows.add_(self.rows(start, start + rows.shape[0]))
