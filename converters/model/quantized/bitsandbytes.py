"""bitsandbytes: 4 bits by blocks (NF4 and FP4, the scales quantized again or not), 8 bits by rows.

4 bits, `X.weight` of any dtype `[n, 1]` holds two values a byte, the high nibble first; each is an
entry of `X.weight.quant_map`, times the block's `X.weight.absmax`. Where that is quantized too
(uint8), it is an entry of `X.weight.nested_quant_map` times the `nested_absmax` of its block, plus
an offset. `X.weight.quant_state.bitsandbytes__nf4` (or fp4) is JSON: shape, dtype, block sizes,
offset. The library rounds what it dequantizes to that dtype, so training saw it rounded.
8 bits, `X.weight` int8 and `X.SCB [out]`: the row's number times SCB / 127.
Source: bitsandbytes `functional.py` (QuantState, dequantize_4bit, int8_vectorwise_dequant).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ...errors import BaseError
from ...files.json_files import parse_json
from ...files.tensors import LazyTensor, nbytes, numel
from .tensor import Packed, Parts, check_shape, floats, number, piece, whole

_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LARGEST = 1 << 16  # bytes of JSON
_INT8 = 7.874015718698502e-3  # 1 / 127 as the library has it


def packed(parts: Parts, _said: Mapping[str, object]) -> Iterator[Packed]:
    """The packed weights among `parts`. Raises `BaseError` for one that is not whole."""
    for name, weight in parts.tensors.items():
        module, _, kind = name.rpartition(".")
        state = next((s for s in _STATES if f"{name}.{s}" in parts.tensors), None)
        if state is not None:
            yield _four_bits(parts, weight, state)
        elif kind == "weight" and weight.dtype == torch.int8 and f"{module}.SCB" in parts.tensors:
            yield _eight_bits(parts, weight, f"{module}.SCB")
            order = parts.take(f"{module}.weight_format")
            if order is not None and (numel(order) != 1 or int(order.load().item()) != 0):
                raise _unfit(order, "numbers in the order of a GPU's tiles", "rows (0)")


@dataclass(frozen=True)
class _Scales:
    """The scale of each block, float32."""

    absmax: LazyTensor
    nested: LazyTensor | None = None
    codes: torch.Tensor | None = None
    block: int = 1
    offset: float = 0.0

    def read(self, start: int, stop: int) -> torch.Tensor:
        if self.nested is None or self.codes is None:
            return floats(self.absmax, start, stop)
        first, last = start // self.block, math.ceil(stop / self.block)
        outer = floats(self.nested, first, last).repeat_interleave(self.block)
        outer = outer[start - first * self.block :][: stop - start]
        return self.codes[piece(self.absmax, start, stop).long()] * outer + self.offset


def _four_bits(parts: Parts, weight: LazyTensor, state: str) -> Packed:
    name = weight.name
    file = parts.need(f"{name}.{state}", weight)
    try:
        if file.dtype != torch.uint8 or numel(file) > _LARGEST:
            raise ValueError(f"{file.dtype} {list(file.shape)}")
        said = parse_json(bytes(file.load().tolist()))
        if not isinstance(said, dict):
            raise ValueError("not an object")
        shape = tuple(said["shape"])
        if not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"shape is {shape}")
        size = number(said, "blocksize", 2, 1 << 16)
        dtype = _DTYPES[said["dtype"]]
        scales = _scales(parts, weight, said)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BaseError(
            "the state of a weight quantized by bitsandbytes cannot be read",
            file=file.path,
            tensor=file.name,
            found=str(error)[:200],
            expected="JSON: shape, dtype, blocksize",
            remedy="the base is damaged: download it again, or deploy an adapter (`adapter`)",
        ) from None
    total, columns = math.prod(shape), shape[-1]
    blocks = math.ceil(total / size)
    codes = whole(parts.need(f"{name}.quant_map", weight))
    if codes.shape != (16,) or nbytes(weight) != math.ceil(total / 2) or size % 2:
        raise _unfit(weight, f"{nbytes(weight)} bytes, blocks of {size}", f"4 bits for {shape}")
    check_shape(scales.absmax, (blocks,))
    per = weight.dtype.itemsize

    def rows(start: int, stop: int) -> torch.Tensor:
        first, last = start * columns // size, math.ceil(stop * columns / size)
        begin, end = first * size, min(total, last * size)
        # Of a storage dtype that is wider than a byte, whole elements can be read.
        low, high = begin // 2 // per, math.ceil(math.ceil(end / 2) / per)
        data = piece(weight, low, high).view(torch.uint8)[begin // 2 - low * per :]
        data = data[: math.ceil(end / 2) - begin // 2]
        values = codes[torch.stack((data >> 4, data & 15), dim=1).flatten().long()]
        values = values[: end - begin]
        scale = scales.read(first, last).repeat_interleave(size)[: end - begin]
        exact = (values * scale)[start * columns - begin : stop * columns - begin]
        return exact.to(dtype).float()

    return Packed(name, name, weight.path, shape, rows)


def _scales(parts: Parts, weight: LazyTensor, said: Mapping[str, object]) -> _Scales:
    absmax = parts.need(f"{weight.name}.absmax", weight)
    nested = parts.take(f"{weight.name}.nested_absmax")
    if nested is None:
        return _Scales(absmax)
    codes = whole(parts.need(f"{weight.name}.nested_quant_map", weight))
    block = number(said, "nested_blocksize", 1, 1 << 20)
    if absmax.dtype != torch.uint8 or codes.shape != (256,):
        raise ValueError(f"absmax is {absmax.dtype}, its map {list(codes.shape)}")
    check_shape(nested, (math.ceil(numel(absmax) / block),))
    return _Scales(absmax, nested, codes, block, float(said["nested_offset"]))  # type: ignore[arg-type]


def _eight_bits(parts: Parts, weight: LazyTensor, scale: str) -> Packed:
    bounds = parts.need(scale, weight)
    if len(weight.shape) != 2:
        raise _unfit(weight, list(weight.shape), "[out, in]")
    out, columns = weight.shape
    check_shape(bounds, (out,))

    def rows(start: int, stop: int) -> torch.Tensor:
        data = piece(weight, start * columns, stop * columns).view(-1, columns).float()
        return data * floats(bounds, start, stop)[:, None] * _INT8

    return Packed(weight.name, weight.name, weight.path, (out, columns), rows)


def _unfit(weight: LazyTensor, found: object, expected: str) -> BaseError:
    return BaseError(
        "a weight quantized by bitsandbytes is not of its format",
        file=weight.path,
        tensor=weight.name,
        found=found,
        expected=expected,
        remedy="the base is damaged: download it again",
    )
