"""Weights of eight bits with a scale beside them: by blocks, by rows, or one for all.

`X.weight` (or a fused `X`) float8, or int8 where the format has it, times `weight_scale_inv`
(DeepSeek, Qwen, MiniMax: by blocks of 128 × 128; Mistral: one number) or `weight_scale`
(compressed-tensors, fbgemm, ModelOpt). A scale of eight bits is an exponent, 2^(s − 127) (mxfp8).
DeepSeek V4's experts beside them are E2M1, `X.weight [out, in/2]` int8, two values a byte, the low
nibble first, a scale for 32 of a row.
Scales of activations and of the cache beside them are no part of a weight.
Source: transformers `integrations/finegrained_fp8.py`, `integrations/fbgemm_fp8.py`;
compressed-tensors `compressors/naive_quantized`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from ...errors import BaseError
from ...files.tensors import LazyTensor, numel
from .fp4 import nibbles
from .tensor import Packed, Parts, exponents, piece

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
_USUAL, _MX = (128, 128), (1, 32)
_OF_ACTIVATIONS = (
    *("input_scale", "output_scale", "activation_scale", "input_scale_ub"),
    *("input_zero_point", "output_zero_point"),
)
_OF_THE_CACHE = ("q_scale", "k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale")


def packed(parts: Parts, said: Mapping[str, object]) -> Iterator[Packed]:
    """The weights of eight and four bits among `parts`. Raises `BaseError` for one without its
    scale."""
    small = said.get("quant_method") == "mxfp8"
    block = said.get("weight_block_size", _MX if small else _USUAL)
    for name, weight in parts.tensors.items():
        if weight.dtype in _FLOAT8 and not name.endswith(_SCALES):
            yield scaled(parts, weight, block)
        elif weight.dtype == torch.int8:
            yield scaled(parts, weight, _MX, pairs=True)
    drop_activations(parts)


def drop_activations(parts: Parts) -> None:
    """Leave out what scales activations and the cache."""
    for name in parts.tensors:
        if name.endswith((*_OF_ACTIVATIONS, *_OF_THE_CACHE)):
            parts.take(name)


def scaled(parts: Parts, weight: LazyTensor, *blocks: object, pairs: bool = False) -> Packed:
    """`weight` times the scale beside it, of blocks of one of the sizes `blocks` where they are
    such; `pairs`: each of its bytes is two values."""
    name = weight.name
    known = next((f"{name}{s}" for s in _SCALES if f"{name}{s}" in parts.tensors), None)
    if known is None and name.endswith(".weight") and f"{name[:-7]}.scale" in parts.tensors:
        known = f"{name[:-7]}.scale"  # DeepSeek V4
    scale = parts.need(known or f"{name}{_SCALES[1]}", weight)
    shape, each = weight.shape, 2 if pairs else 1
    shape = (*shape[:-1], *(length * each for length in shape[-1:]))
    sizes, grid = _blocks(shape, scale, blocks)
    columns = shape[-1]
    across = torch.arange(columns) // sizes[-1]

    def rows(start: int, stop: int) -> torch.Tensor:
        left, index, stride = torch.arange(start, stop), torch.zeros(stop - start).long(), 1
        for length, size, count in reversed(list(zip(shape[:-1], sizes, grid, strict=False))):
            index += left % length // size * stride
            left, stride = left // length, stride * count
        low, high = int(index.min()), int(index.max()) + 1
        part = exponents(scale, low * grid[-1], high * grid[-1]).view(-1, grid[-1])
        data = piece(weight, start * columns // each, stop * columns // each)
        data = nibbles(data.view(torch.uint8)) if pairs else data.float()
        return data.view(-1, columns) * part[index - low][:, across]

    return Packed(name, name, weight.path, shape, rows)


def _blocks(
    shape: tuple[int, ...], scale: LazyTensor, blocks: tuple[object, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Along each axis of a weight of `shape` the elements that share a scale, and the number of
    scales: one, one a row or column, or of `blocks`, of which the last may be smaller; equal ones
    where none are told."""
    axes = len(shape)
    grid = scale.shape
    if numel(scale) == 1:
        grid = (1,) * axes
    elif len(grid) == 1 and axes == 2 and grid[0] == shape[0]:
        grid = (grid[0], 1)
    given = [tuple(block) for block in blocks if isinstance(block, list | tuple)]
    given = [(1,) * (axes - len(block)) + block for block in given]
    plain = not given or all(n in (1, m) for m, n in zip(shape[-2:], grid[-2:], strict=False))
    sizes: list[set[int]] = []
    for axis, (length, count) in enumerate(zip(shape, grid, strict=False)):
        said = {b[axis] for b in given if type(b[axis]) is int and b[axis] > 0}
        free = plain or axis < axes - 2
        fit = {size for size in said if math.ceil(length / size) == count}
        if count == 1 and (free or fit):
            sizes.append({max(1, length)})
        elif fit:
            sizes.append(fit)
        elif free and count and length % count == 0:
            sizes.append({length // count})
    if len(grid) != axes or axes < 2 or [len(found) for found in sizes] != [1] * axes:
        raise BaseError(
            "the scale of a quantized weight does not fit it",
            file=scale.path,
            tensor=scale.name,
            found=f"{list(scale.shape)} for {list(shape)}",
            expected="one number, one a row, or blocks of "
            f"{' or '.join(map(str, given)) or 'equal sizes'}",
            remedy="the base is damaged, or quantized in a way that is not known",
        )
    return tuple(size for found in sizes for size in found), grid
