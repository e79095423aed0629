"""compressed-tensors, as llm-compressor writes it: what `config_groups` say of each linear layer.

- float-quantized, int-quantized, naive-quantized: `X.weight` of eight bits times
  `X.weight_scale`, for all, by rows or by blocks; mxfp8-quantized: a scale of bytes, 2^(s − 127).
- nvfp4-pack-quantized: `X.weight_packed [out, in/2]` uint8, two E2M1 values a byte, the low nibble
  first, times `X.weight_scale [out, in/16]` float8, divided by `X.weight_global_scale`; the library
  rounds the product to bfloat16. mxfp4-pack-quantized: `[out, in/32]` bytes, no global scale.
- pack-quantized: `X.weight_packed` int32, a stream of bits along each row of the `X.weight_shape`,
  each number as it is plus half the range, less `X.weight_zero_point` (packed along the rows)
  where there is one, times the `X.weight_scale [out, groups]`; `X.weight_g_idx [in]` is the group
  of each input where activations ordered them, -1 where they did not.
Source: compressed-tensors `compressors/*/base.py`, `quantization/lifecycle/forward_helpers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from ...errors import BaseError
from ...files.tensors import LazyTensor, numel
from .fp4 import nibbles
from .ints import unpacked
from .scaled import drop_activations, scaled
from .tensor import (
    Packed,
    Parts,
    check_shape,
    exponents,
    held,
    number,
    piece,
    unknown,
    whole,
)

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_KNOWN = ("float-quantized", "int-quantized", "naive-quantized", "mxfp8-quantized")
_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")


def packed(parts: Parts, said: Mapping[str, object]) -> Iterator[Packed]:
    """The quantized weights among `parts`. Raises `BaseError` for one that is not of its format,
    and for formats beside those above."""
    groups = said.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    groups = [each for each in groups if isinstance(each, Mapping)]
    formats = {str(each.get("format") or said.get("format")) for each in groups or [said]}
    other = formats - {*_KNOWN, *_PACKED, "None", "dense"}
    sparse = said.get("sparsity_config")
    sparse = sparse.get("format") if isinstance(sparse, Mapping) else None
    if other or sparse not in (None, "dense") or said.get("transform_config"):
        found = f"format {', '.join(sorted(other))}" if other else "sparsity or rotated weights"
        raise unknown(parts, found, ", ".join((*_KNOWN, *_PACKED)))
    weights = [each["weights"] for each in groups if isinstance(each.get("weights"), Mapping)]
    blocks = [_structure(each) for each in weights]
    bits = sorted({number(w, "num_bits", 1, 8) for w in weights})
    for name, weight in parts.tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight_packed" and weight.dtype == torch.uint8:
            yield _fp4(parts, weight, stem)
        elif kind == "weight_packed":
            yield _ints(parts, weight, stem, bits, weights)
        elif kind == "weight" and weight.dtype in _EIGHT_BITS:
            if f"{stem}.weight_zero_point" in parts.tensors:
                raise unknown(parts, f"{stem}.weight_zero_point", "symmetric weights of 8 bits")
            yield scaled(parts, weight, *blocks)
    drop_activations(parts)
    for name in parts.tensors:
        if name.endswith(".input_global_scale"):
            parts.take(name)


def _structure(said: Mapping[str, object]) -> object:
    """The size of the blocks, or of groups of a row; None where there are none. Until 2025 the
    library wrote "128x128"."""
    size = said.get("block_structure")
    if isinstance(size, str):
        size = [int(part) for part in size.split("x")]
    if said.get("strategy") == "block" and not isinstance(size, list):
        raise ValueError(f"block_structure is {size}")
    return (1, said["group_size"]) if size is None and said.get("group_size") else size


def _fp4(parts: Parts, weight: LazyTensor, stem: str) -> Packed:
    scale = parts.need(f"{stem}.weight_scale", weight)
    divisor = parts.take(f"{stem}.weight_global_scale")
    if len(weight.shape) != 2 or len(scale.shape) != 2:
        raise _unfit(weight, list(weight.shape), "a matrix")
    out, half = weight.shape
    size = 32 if divisor is None else 16
    columns, groups = half * 2, half * 2 // size
    check_shape(scale, (out, groups))
    if columns % size or (divisor is not None and numel(divisor) != 1):
        raise _unfit(weight, list(weight.shape), f"groups of {size} and one global scale")

    def rows(start: int, stop: int) -> torch.Tensor:
        factor = exponents(scale, start * groups, stop * groups)
        if divisor is not None:
            factor = factor / whole(divisor).flatten()
        values = nibbles(piece(weight, start * half, stop * half)).view(-1, size)
        found = (values * factor[:, None]).view(-1, columns)
        return found if divisor is None else found.to(torch.bfloat16).float()

    return Packed(weight.name, f"{stem}.weight", weight.path, (out, columns), rows)


def _ints(
    parts: Parts,
    weight: LazyTensor,
    stem: str,
    known: list[int],
    told: list[Mapping[str, object]],
) -> Packed:
    scale = parts.need(f"{stem}.weight_scale", weight)
    zeros = parts.take(f"{stem}.weight_zero_point")
    if zeros is None and told and all(each.get("symmetric") is False for each in told):
        parts.need(f"{stem}.weight_zero_point", weight)
    sizes = parts.need(f"{stem}.weight_shape", weight)
    if numel(sizes) != 2 or len(weight.shape) != 2 or weight.dtype != torch.int32:
        raise _unfit(weight, f"{weight.dtype} {list(weight.shape)}", "an int32 matrix")
    out, columns = (int(n) for n in sizes.load().flatten().tolist())
    words = weight.shape[1]
    bits = next((b for b in known if math.ceil(columns * b / 32) == words), 0)
    groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    counts = {_groups(each, columns) for each in told}
    if weight.shape[0] != out or not bits or columns < 1 or not groups or columns % groups:
        raise _unfit(weight, list(weight.shape), f"[{out}, {columns}] of {known} bits")
    check_shape(scale, *((out, count) for count in counts), *([(1,)] if groups == 1 else []))
    if zeros is not None:
        check_shape(zeros, (math.ceil(out * bits / 32), groups))
    half, index = 1 << (bits - 1), torch.arange(columns) // (columns // groups)
    order = parts.take(f"{stem}.weight_g_idx")
    if order is not None:
        check_shape(order, (columns,))
        found = order.load().long()
        if int(found.min()) >= 0:
            index = found
        if int(index.max()) >= groups:
            raise _unfit(order, f"groups to {int(index.max())}", f"{groups} groups")

    def parts_of_it() -> tuple[torch.Tensor, torch.Tensor]:
        zero = torch.full((out, groups), half)
        if zeros is not None:
            zero = unpacked(zeros.load(), bits, out)
        return zero, whole(scale).expand(out, groups)

    def rows(start: int, stop: int) -> torch.Tensor:
        zero, factor = held(parts_of_it, parts_of_it)
        data = piece(weight, start * words, stop * words).view(-1, words)
        values = unpacked(data.T.contiguous(), bits, columns).T
        return (values - zero[start:stop][:, index]) * factor[start:stop][:, index]

    return Packed(weight.name, f"{stem}.weight", weight.path, (out, columns), rows)


def _groups(told: Mapping[str, object], columns: int) -> int:
    """How many groups a row of that many columns has; -1 is told of a whole row too."""
    size = told.get("group_size")
    return math.ceil(columns / size) if isinstance(size, int) and size > 0 else 1


def _unfit(weight: LazyTensor, found: object, expected: str) -> BaseError:
    return BaseError(
        "a weight quantized by compressed-tensors is not of its format",
        file=weight.path,
        tensor=weight.name,
        found=found,
        expected=expected,
        remedy="the base is damaged, or quantized in a way that is not known",
    )
