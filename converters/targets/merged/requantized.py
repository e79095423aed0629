"""Merged weights back in float8, with a fresh scale for every block of them.

As DeepSeek and Qwen ship them: `X.weight` float8_e4m3fn, and beside it `X.weight_scale_inv`, the
number that each block is multiplied with. The scale makes a block's largest weight the largest
float8 number, or is the next power of two where the format says so (`scale_fmt` ue8m0).
Source: transformers `integrations/finegrained_fp8.py`; DeepSeek-V3 `inference/kernel.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ...errors import BaseError
from ...files.tensors import LazyTensor, rows_and_columns
from ...model.base import CONV1D_FAMILIES, BaseModel
from ...model.quantized import Dequantized, quantization
from ...run import Run
from ...updates.update import transposed

FLOAT8 = torch.float8_e4m3fn
SCALES = "_scale_inv"
_LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` x `columns` weights with a scale each, of the dtype `kept`; `powers`: of
    two."""

    rows: int
    columns: int
    kept: torch.dtype = torch.float32
    powers: bool = False

    def scales(self, matrix: torch.Tensor) -> torch.Tensor:
        """Those of `matrix` float32 `[rows, columns]`, of its last blocks as far as they go."""
        rows, columns = matrix.shape
        across = torch.nn.functional.pad(matrix.abs(), (0, -columns % self.columns))
        bands = across.view(rows, -1, self.columns).amax(dim=2)
        down = torch.nn.functional.pad(bands, (0, 0, 0, -rows % self.rows))
        scales = down.view(-1, self.rows, down.shape[1]).amax(dim=1) / _LARGEST
        scales = torch.where(scales > 0, scales, 1.0)
        return (scales.log2().ceil().exp2() if self.powers else scales).to(self.kept)

    def spread(self, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The scale of every weight, float32 `[rows, columns]`."""
        wide = scales.float().repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return wide[:rows, :columns]


@dataclass(frozen=True)
class Scales:
    """The scales of a merged weight, read as a tensor of their own: `source` and the update of
    `module`, which is none for an untouched one, in memory one band of blocks at a time."""

    name: str
    source: LazyTensor
    blocks: Blocks
    run: Run
    module: str
    turned: bool
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.source.shape
        grid = math.ceil(rows / self.blocks.rows), math.ceil(columns / self.blocks.columns)
        object.__setattr__(self, "shape", grid)

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.kept

    def load(self) -> torch.Tensor:
        return self._made

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        buffer.copy_(self._made.flatten()[start : start + buffer.numel()])

    @cached_property
    def _made(self) -> torch.Tensor:
        update = self.run.take(self.module)
        update = transposed(update) if self.turned else update
        rows, columns = rows_and_columns(self.source.shape)
        step = rows if update.whole else self.blocks.rows

        def bands() -> Iterator[torch.Tensor]:
            for start in range(0, rows, step):
                band = torch.empty(min(step, rows - start), columns, dtype=self.source.dtype)
                self.source.read_into(band.view(-1), start * columns)
                update.merge(band := band.float(), start)
                yield self.blocks.scales(band)

        return torch.cat([*bands()])


def blocks_of(base: BaseModel) -> Blocks:
    """The blocks that `base` is quantized by. Raises `BaseError` where it is so in another way."""
    said = quantization(base.config) or {}
    size = said.get("weight_block_size")
    scales = [t for n, t in _stored(base).items() if n.endswith(SCALES)]
    kinds = {tensor.dtype for tensor in scales}
    plain = kinds in ({torch.float32}, {torch.bfloat16})
    known = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int for n in size)
    turned = base.config.get("model_type") in CONV1D_FAMILIES  # as floats alone
    if said.get("quant_method") != "fp8" or not known or not plain or turned:
        raise BaseError(
            "only weights in float8 by blocks can be quantized again",
            file=base.path,
            found=f"{said.get('quant_method') or 'no quantization'}, weight_block_size {size}",
            expected="quant_method fp8, with weight_block_size and floats for scales, of linear "
            "layers [out, in]",
            remedy="merge without `requantize`, and quantize that with the tool of its format",
        )
    assert isinstance(size, list | tuple)
    return Blocks(size[0], size[1], kinds.pop(), said.get("scale_fmt") == "ue8m0")


def _stored(base: BaseModel) -> dict[str, LazyTensor]:
    return {name: t for shard in (base.stored or {}).values() for name, t in shard.items()}


def stored_parts(base: BaseModel, weight: LazyTensor) -> list[LazyTensor]:
    """The packed weight and its scales as the files hold them. Raises `BaseError` for a weight that
    has no scales by blocks."""
    tensors = _stored(base)
    parts = [tensors.get(weight.name), tensors.get(f"{weight.name}{SCALES}")]
    found = [part for part in parts if part is not None]
    if not isinstance(weight, Dequantized) or len(found) < 2 or len(weight.shape) != 2:
        raise BaseError(
            "this weight is not quantized by blocks, as the others are",
            file=base.path,
            tensor=weight.name,
            found=list(weight.shape),
            expected=f"a matrix with {weight.name}{SCALES} beside it",
            remedy="merge without `requantize`",
        )
    return found
