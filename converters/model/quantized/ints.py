"""Whole numbers of a few bits in int32, with a scale and a zero for each group: GPTQ and AWQ.

`X.qweight`, `X.qzeros`, `X.scales [groups, out]` and the weight is `[out, in]`, transposed:
(q − zero) · scale of the group of its input.
- GPTQ: `qweight [in · bits / 32, out]`, one stream of bits along the inputs, `qzeros [groups,
  out · bits / 32]` along the outputs; `g_idx [in]` is the group of each input (act order), else
  groups are consecutive. The first format stores the zero less one, and wraps.
- AWQ (gemm): `qweight [in, out / 8]` and `qzeros`, 4 bits, eight outputs an int32 in the order
  0 2 4 6 1 3 5 7.
The libraries multiply in the dtype of their scales or in another, as the device has it; here it
is float32.
Source: AutoGPTQ and GPTQModel `nn_modules/qlinear` (pack, dequantize_weight), AutoAWQ
`utils/packing_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from ...errors import BaseError
from ...files.tensors import LazyTensor
from .tensor import Packed, Parts, check_shape, held, unknown, whole

_WEIGHT = ".qweight"
_BITS = (2, 3, 4, 8)
_PLACE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of each of eight outputs in an int32


def gptq(parts: Parts, said: Mapping[str, object]) -> Iterator[Packed]:
    """The weights in GPTQ's format. Raises `BaseError` for one that is not of it."""
    kind = str(said.get("checkpoint_format") or said.get("format") or "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise unknown(parts, f"checkpoint_format {kind}", "gptq or gptq_v2")
    bits, group = said.get("bits", 4), said.get("group_size", -1)
    for weight in _weights(parts):
        yield _gptq(parts, weight, bits, group, 1 if kind == "gptq" else 0)
    _check_left(parts)


def awq(parts: Parts, said: Mapping[str, object]) -> Iterator[Packed]:
    """The weights in AWQ's format. Raises `BaseError` for one that is not of it."""
    kind = str(said.get("version") or said.get("format") or "gemm").lower()
    bits = said.get("bits", said.get("w_bit", 4))
    if kind != "gemm" or bits != 4:
        raise unknown(parts, f"version {kind}, {bits} bits", "gemm, 4 bits")
    for weight in _weights(parts):
        if said.get("zero_point") is not False:  # by default they are there
            parts.need(weight.name.removesuffix(_WEIGHT) + ".qzeros", weight)
        yield _awq(parts, weight)
    _check_left(parts)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` numbers of `bits` along the first axis of int32 `words`, one stream of bits."""
    begin = torch.arange(count) * bits
    word, shift = begin // 32, (begin % 32).view(-1, *[1] * (words.dim() - 1))
    values = (words[word] >> shift) & ((1 << bits) - 1)
    split = (begin % 32 + bits > 32).nonzero().flatten()
    if len(split):  # 3 bits across two words; a shift of a negative int32 fills with its sign
        low = values[split] & ((1 << (32 - shift[split])) - 1)
        high = words[word[split] + 1] << (32 - shift[split])
        values[split] = (low | high) & ((1 << bits) - 1)
    return values


def _weights(parts: Parts) -> list[LazyTensor]:
    return [tensor for name, tensor in parts.tensors.items() if name.endswith(_WEIGHT)]


def _gptq(parts: Parts, weight: LazyTensor, bits: object, group: object, less: int) -> Packed:
    stem = weight.name.removesuffix(_WEIGHT)
    zeros, scales = (parts.need(f"{stem}.{part}", weight) for part in ("qzeros", "scales"))
    order = parts.take(f"{stem}.g_idx")
    _check_axes(weight, scales, zeros)
    words, out = weight.shape
    groups = scales.shape[0]
    if order is not None and order.shape[0] and words * 32 % order.shape[0] == 0:
        bits = words * 32 // order.shape[0]  # a module may have others than the rest
    if bits not in _BITS:
        raise _unfit(weight, f"{bits} bits", f"one of {_BITS}")
    assert isinstance(bits, int)
    inn = words * 32 // bits
    check_shape(scales, (groups, out))
    check_shape(zeros, (groups, math.ceil(out * bits / 32)))
    size = group if isinstance(group, int) and group > 0 else inn
    if order is not None:
        check_shape(order, (inn,))
    elif math.ceil(inn / size) != groups:
        raise _unfit(weight, f"{groups} groups", f"{inn} inputs in groups of {size}")

    def parts_of_it() -> tuple[torch.Tensor, ...]:
        zero = unpacked(zeros.load().T.contiguous(), bits, out).T
        index = torch.arange(inn) // size if order is None else order.load().long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise _unfit(weight, f"g_idx to {int(index.max())}", f"{groups} groups")
        return weight.load(), (zero + less) & ((1 << bits) - 1), whole(scales), index

    def rows(start: int, stop: int) -> torch.Tensor:
        packed, zero, scale, index = held(parts_of_it, parts_of_it)
        values = unpacked(packed[:, start:stop], bits, inn)
        values -= zero[:, start:stop][index]
        return (values * scale[:, start:stop][index]).T.contiguous()

    return Packed(weight.name, f"{stem}.weight", weight.path, (out, inn), rows)


def _awq(parts: Parts, weight: LazyTensor) -> Packed:
    stem = weight.name.removesuffix(_WEIGHT)
    scales = parts.need(f"{stem}.scales", weight)
    zeros = parts.take(f"{stem}.qzeros")
    _check_axes(weight, scales, *([] if zeros is None else [zeros]))
    inn, words = weight.shape
    groups, out = scales.shape[0], words * 8
    check_shape(scales, (groups, out))
    if groups == 0 or inn % groups:
        raise _unfit(weight, f"{groups} groups", f"equal ones of {inn} inputs")
    if zeros is not None:
        check_shape(zeros, (groups, words))
    index = torch.arange(inn) // (inn // groups)

    def parts_of_it() -> tuple[torch.Tensor, ...]:
        zero = torch.full((groups, out), 8) if zeros is None else _eight(zeros.load())
        return weight.load(), zero, whole(scales)

    def rows(start: int, stop: int) -> torch.Tensor:
        packed, zero, scale = held(parts_of_it, parts_of_it)
        first = start // 8
        values = _eight(packed[:, first : math.ceil(stop / 8)])
        values = values[:, start - first * 8 : stop - first * 8] - zero[:, start:stop][index]
        return (values * scale[:, start:stop][index]).T.contiguous()

    return Packed(weight.name, f"{stem}.weight", weight.path, (out, inn), rows)


def _eight(words: torch.Tensor) -> torch.Tensor:
    """AWQ's `[n, m]` → `[n, 8 m]`."""
    return ((words[:, :, None] >> (4 * _PLACE)) & 15).flatten(1)


def _check_axes(*tensors: LazyTensor) -> None:
    for tensor in tensors:
        ints = tensor.name.endswith((_WEIGHT, ".qzeros"))
        if len(tensor.shape) != 2 or (ints and tensor.dtype != torch.int32):
            raise _unfit(tensor, f"{tensor.dtype} {list(tensor.shape)}", "a matrix, of int32")


def _check_left(parts: Parts) -> None:
    """Raise `BaseError` where something is scaled that is no weight: AWQ divides the activations
    of some families."""
    for name, tensor in parts.tensors.items():
        if name.endswith((".scales", ".qzeros")) and name not in parts.used:
            raise _unfit(tensor, "scales of no packed weight", "weights alone to be quantized")


def _unfit(weight: LazyTensor, found: str, expected: str) -> BaseError:
    return BaseError(
        "a quantized weight is not of its format",
        file=weight.path,
        tensor=weight.name,
        found=found,
        expected=expected,
        remedy="the base is damaged, or quantized in a way that is not known",
    )
