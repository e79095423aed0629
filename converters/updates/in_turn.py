"""Several updates of one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .update import Update


@dataclass(frozen=True)
class InTurn:
    """W' = what the last of `updates` makes of what those before it made of W."""

    updates: tuple[Update, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.updates[0].shape

    @property
    def whole(self) -> bool:
        return any(update.whole for update in self.updates)

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        for update in self.updates:
            rows = update.merge(rows, start)
        return rows

    def components(self) -> None:
        return None
