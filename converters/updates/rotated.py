"""One small matrix, again and again, each time with its columns rotated (MoRA type 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotatedBlocks:
    """W' = W + ΔW with ΔW made of blocks `[n, n]`: block k takes inputs kn to (k+1)n, beginning
    again where they end, and gives outputs kn to (k+1)n, as do its repetitions after all blocks.

    `blocks [k, n, n]` float32: one matrix whose columns are rotated as RoPE does at position k.
    """

    blocks: torch.Tensor
    shape: tuple[int, int]
    whole: bool = False

    def components(self) -> None:
        return None

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        (out, inn), (count, n, _) = self.shape, self.blocks.shape
        position = torch.arange(start, start + rows.shape[0]) % min(out, count * n)
        block, row = position // n, position % n
        inputs = (block.unsqueeze(1) * n + torch.arange(n)) % inn
        delta = torch.zeros(rows.shape[0], inn).scatter_add_(1, inputs, self.blocks[block, row])
        return rows.add_(delta)


def rotated(matrix: torch.Tensor, shape: tuple[int, int]) -> RotatedBlocks:
    """The blocks of the trained `matrix [n, n]` on a weight of `shape [out, in]`."""
    n = matrix.shape[0]
    count = -(-shape[1] // n)
    inverse = 1.0 / (10000 ** (torch.arange(0, n, 2).float() / n))
    angle = torch.outer(torch.arange(count).float(), inverse).repeat(1, 2).unsqueeze(1)
    half = n // 2
    turned = torch.cat([matrix[:, half:], -matrix[:, :half]], dim=1)
    return RotatedBlocks(matrix * angle.cos() + turned * angle.sin(), shape)
