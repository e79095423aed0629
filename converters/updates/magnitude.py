"""Weight-decomposed DoRA: every row of the weight gets a length of its own.

Liu et al. 2024, arXiv 2402.09353, equation 5. The norm depends on the base weight, so the update
is no sum of rank-1 components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rank_one import RankOneSum


@dataclass(frozen=True)
class MagnitudeUpdate:
    """W' = (m / ‖W + ΔW‖) ⊙ (W + ΔW), the norm over `in`.

    `magnitude [out]` float32; `delta` is ΔW, of rank 0 where the magnitude alone was trained.
    """

    magnitude: torch.Tensor
    delta: RankOneSum
    whole: bool = False

    def __post_init__(self) -> None:
        if self.magnitude.shape != (self.shape[0],):
            raise ValueError(
                f"magnitude {list(self.magnitude.shape)} does not fit a weight {list(self.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    def components(self) -> None:
        return None

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        self.delta.merge(rows, start)
        magnitude = self.magnitude[start : start + rows.shape[0]]
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return rows.mul_((magnitude / norm).float().unsqueeze(1))
