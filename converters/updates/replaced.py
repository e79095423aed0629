"""Weights, or single rows of them such as the embeddings of new tokens, trained whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Replacement:
    """W' = `weight [out, in]`, float32, whatever the base holds."""

    weight: torch.Tensor
    whole: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return rows.copy_(self.weight[start : start + rows.shape[0]])

    def components(self) -> None:
        return None


@dataclass(frozen=True)
class ReplacedRows:
    """`rows [n, in]`, float32, take the place of those at `index [n]` of a weight of `shape`."""

    index: torch.Tensor
    rows: torch.Tensor
    shape: tuple[int, int]
    whole: bool = False

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        inside = (self.index >= start) & (self.index < start + rows.shape[0])
        rows[self.index[inside] - start] = self.rows[inside]
        return rows

    def components(self) -> None:
        return None
