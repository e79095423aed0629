"""What every kind of update is: a function from the base weight to the deployed weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from .rank_one import RankOneSum


class Update(Protocol):
    """A function from the base weight `[out, in]` to the deployed weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]` of the weight it applies to."""

    @property
    def whole(self) -> bool:
        """Whether `merge` must be given all rows at once."""

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Turn float32 base `rows [n, in]`, which begin at row `start`, into deployed ones, in
        place."""

    def components(self) -> RankOneSum | None:
        """The update as a sum of rank-1 components, None where it is not one."""


def convolution_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A convolution's weight `[out, in, *kernel]` as an update sees it, with `out` rows."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class _Transposed:
    """`update` for a weight stored the other way round."""

    update: Update
    whole: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.update.shape[1], self.update.shape[0]

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return rows.copy_(self.update.merge(rows.T.contiguous(), start).T)

    def components(self) -> None:
        return None


def transposed(update: Update) -> Update:
    """The same update for a weight stored as `[in, out]`."""
    components = update.components()
    return _Transposed(update) if components is None else components.transposed()
