"""Weights of eight bits with a scale beside them: by blocks, by rows, or one for all.

`X.weight` (or a fused `X`) float8, or int8 where the format has it, times `weight_scale_inv`
(DeepSeek, Qwen, MiniMax: by blocks of 128 × 128; Mistral: one number) or `weight_scale`
(compressed-tensors, fbgemm, ModelOpt). A scale of eight bits is an exponent, 2^(s − 127) (mxfp8).
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
from .tensor import Packed, Parts, floats, piece

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
_USUAL = (128, 128)
_OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "input_scale_ub")
_OF_THE_CACHE = ("q_scale", "k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale")


def packed(parts: Parts, said: Mapping[str, object]) -> Iterator[Packed]:
    """The float8 weights among `parts`. Raises `BaseError` for one without its scale."""
    block = said.get("weight_block_size", _USUAL)
    for name, weight in parts.tensors.items():
        if weight.dtype in _FLOAT8 and not name.endswith(_SCALES):
            yield scaled(parts, weight, block)
    drop_activations(parts)


def drop_activations(parts: Parts) -> None:
    """Leave out what scales activations and the cache."""
    for name in parts.tensors:
        if name.endswith((*_OF_ACTIVATIONS, *_OF_THE_CACHE)):
            parts.take(name)


def scaled(parts: Parts, weight: LazyTensor, block: object = None) -> Packed:
    """`weight` times the scale beside it, of blocks of the size `block` where they are such."""
    name = weight.name
    known = next((f"{name}{s}" for s in _SCALES if f"{name}{s}" in parts.tensors), None)
    if known is None and name.endswith(".weight") and f"{name[:-7]}.scale" in parts.tensors:
        known = f"{name[:-7]}.scale"  # DeepSeek V4
    scale = parts.need(known or f"{name}{_SCALES[1]}", weight)
    shape = weight.shape
    sizes, grid = _blocks(weight, scale, block)
    columns = shape[-1]
    across = torch.arange(columns) // sizes[-1]

    def rows(start: int, stop: int) -> torch.Tensor:
        left, index, stride = torch.arange(start, stop), torch.zeros(stop - start).long(), 1
        for length, size, count in reversed(list(zip(shape[:-1], sizes, grid, strict=False))):
            index += left % length // size * stride
            left, stride = left // length, stride * count
        low, high = int(index.min()), int(index.max()) + 1
        part = exponents(scale, low * grid[-1], high * grid[-1]).view(-1, grid[-1])
        data = piece(weight, start * columns, stop * columns).view(-1, columns).float()
        return data * part[index - low][:, across]

    return Packed(name, name, weight.path, shape, rows)


def exponents(scale: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """Elements of a scale, float32; of one of bytes two to the power of each."""
    if scale.dtype == torch.uint8:
        return (piece(scale, start, stop).float() - 127).exp2()
    return floats(scale, start, stop)


def _blocks(
    weight: LazyTensor, scale: LazyTensor, block: object
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Along each axis of `weight` the elements that share a scale, and the number of scales."""
    axes = len(weight.shape)
    grid = scale.shape
    if numel(scale) == 1:
        grid = (1,) * axes
    elif len(grid) == 1 and axes == 2 and grid[0] == weight.shape[0]:
        grid = (grid[0], 1)
    given = tuple(block) if isinstance(block, list | tuple) else ()
    given = (1,) * (axes - len(given)) + given
    sizes = []
    for length, count, size in zip(weight.shape, grid, given, strict=False):
        if count == 1:
            sizes.append(max(1, length))
        elif type(size) is int and size > 0 and math.ceil(length / size) == count:
            sizes.append(size)
        elif count and length % count == 0:
            sizes.append(length // count)
    if len(grid) != axes or len(sizes) != axes or axes < 2:
        raise BaseError(
            "the scale of a quantized weight does not fit it",
            file=scale.path,
            tensor=scale.name,
            found=f"{list(scale.shape)} for {list(weight.shape)}",
            expected=f"one number, one a row, or blocks of {block or 'equal sizes'}",
            remedy="the base is damaged, or quantized in a way that is not known",
        )
    return tuple(sizes), grid
