"""Weight-decomposed DoRA: every row of the weight gets a length of its own.

Liu et al. 2024, arXiv 2402.09353, equation 5. The norm depends on the base weight, so the update
is no sum of rank-1 components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .update import RankOneSum


@dataclass(frozen=True)
class MagnitudeUpdate:
    """W' = (m / ‖W + ΔW‖) ⊙ (W + ΔW), the norm over `in`.

    `magnitude [out]` float32; `delta` is ΔW, of rank 0 where the magnitude alone was trained.
    `axis` is where `in` lies in the stored weight: 1, or 0 for a weight stored as `[in, out]`.
    """

    magnitude: torch.Tensor
    delta: RankOneSum
    axis: int = 1

    def __post_init__(self) -> None:
        if self.magnitude.shape != (self.shape[1 - self.axis],):
            raise ValueError(
                f"magnitude {list(self.magnitude.shape)} does not fit a weight {list(self.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    @property
    def whole(self) -> bool:
        """A block of rows of `[in, out]` does not hold the columns that the norm is over."""
        return self.axis == 0

    def components(self) -> None:
        return None

    def transposed(self) -> MagnitudeUpdate:
        return MagnitudeUpdate(self.magnitude, self.delta.transposed(), 1 - self.axis)

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        self.delta.merge(rows, start)
        magnitude = self.magnitude
        if not self.whole:
            magnitude = magnitude[start : start + rows.shape[0]]
        norm = torch.linalg.vector_norm(rows, dim=self.axis, dtype=torch.float64)
        return rows.mul_((magnitude / norm).float().unsqueeze(self.axis))
