"""Quantized bases: which quantization a base has, and the float weights of its packed tensors.

Recognised by the configuration's `quantization_config`. One file for each format: it finds, in the
tensors of a base's files, those that are parts of packed weights, and gives in their place tensors
that are dequantized while they are read. The values are those that the library which owns the
format makes of them, in float32 where it does not itself round them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ...errors import BaseError
from ...files.tensors import LazyTensor, LazyTensors
from . import bitsandbytes, compressed, fp4, ints, scaled
from .tensor import Dequantized, Packed, Parts, unknown

Format = Callable[[Parts, Mapping[str, object]], Iterator[Packed]]

_FORMATS: dict[str, Format] = {
    "awq": ints.awq,
    "bitsandbytes": bitsandbytes.packed,
    "compressed-tensors": compressed.packed,
    "fp8": scaled.packed,
    "fbgemm_fp8": scaled.packed,
    "gptq": ints.gptq,
    "mxfp4": fp4.packed,
    "mxfp8": scaled.packed,
}
METHODS = tuple(_FORMATS)
_DTYPES = {str(t)[len("torch.") :]: t for t in (torch.float32, torch.float16, torch.bfloat16)}
_KEYS = ("quantization_config", "compression_config")


def quantization(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """What a base's `config` says of its quantization, of the text model's in a multimodal one;
    None where it says nothing."""
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, Mapping) else {}):
        for key in _KEYS:
            said = holder.get(key)
            if said:
                return said if isinstance(said, Mapping) else {"quant_method": str(said)}
    return None


def method(config: Mapping[str, object]) -> str | None:
    """The name of a base's quantization; None where it has none."""
    said = quantization(config)
    if said is None:
        return None
    bits = [key for key in ("load_in_4bit", "load_in_8bit") if said.get(key)]
    return str(said.get("quant_method") or ("bitsandbytes" if bits else "unnamed"))


def unquantized(config: Mapping[str, object]) -> dict[str, object]:
    """`config` without what it says of a quantization."""
    told = (*_KEYS, "expert_dtype")  # DeepSeek V4
    plain = {key: value for key, value in config.items() if key not in told}
    text = plain.get("text_config")
    return {**plain, "text_config": unquantized(text)} if isinstance(text, Mapping) else plain


def dequantized(
    config: Mapping[str, object], shards: Mapping[Path, LazyTensors]
) -> dict[Path, LazyTensors] | None:
    """The tensors of a base with float ones in the places of packed ones, which read as float32.

    None where the base is not quantized, in a way that is not known, or holds nothing packed.
    Raises `BaseError` for packed tensors that are not of their format.
    """
    said, kind = quantization(config), method(config)
    if said is None or kind not in _FORMATS:
        return None
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    parts = Parts(tensors)
    try:
        found = list(_FORMATS[kind](parts, said))
    except BaseError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise BaseError(
            "the configuration's quantization is not of its format",
            file=next(iter(shards)).parent / "config.json",
            found=f"{kind}: {error}",
            remedy="the base is damaged: download it again",
        ) from None
    if not found:
        return None
    for each in found:
        if each.name in tensors and each.name not in parts.used and each.name != each.main:
            raise BaseError(
                "the base holds a weight both quantized and plain",
                file=each.path,
                tensor=each.name,
                found=f"also {each.main}",
            )
    made = {each.main for each in found}
    for name, tensor in tensors.items():
        if name not in made and name not in parts.used and _meaningless(tensor):
            raise unknown(parts, f"{name}, {tensor.dtype}", f"weights of {kind} alone")
    dtype = _dtype_before(config) or _commonest(tensors, parts.used) or torch.bfloat16
    floats_of = {packed.main: packed.tensor(dtype) for packed in found}
    result: dict[Path, LazyTensors] = {}
    for path, shard in shards.items():
        floats: dict[str, LazyTensor] = {}
        for name, tensor in shard.items():
            if name in floats_of:
                floats[floats_of[name].name] = floats_of[name]
            elif name not in parts.used:
                floats[name] = tensor
        if floats:
            result[path] = floats
    return result


def _meaningless(tensor: LazyTensor) -> bool:
    """Whether the numbers of `tensor` mean nothing without scales beside them. Bytes may also be a
    mask."""
    kind = tensor.dtype
    known = kind == torch.int8 or (kind == torch.uint8 and tensor.name.endswith(".weight"))
    return known or (kind.is_floating_point and kind.itemsize == 1)


def dtype_before(tensor: LazyTensor) -> torch.dtype:
    """The dtype that a tensor of a base has, or had before it was quantized."""
    return tensor.before if isinstance(tensor, Dequantized) else tensor.dtype


def _dtype_before(config: Mapping[str, object]) -> torch.dtype | None:
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            name = str(holder.get(key)).removeprefix("torch.")
            if name in _DTYPES:
                return _DTYPES[name]
    return None


def _commonest(tensors: LazyTensors, used: set[str]) -> torch.dtype | None:
    """The dtype of most tensors that are not packed."""
    plain = [t.dtype for name, t in tensors.items() if name not in used]
    floats = [dtype for dtype in plain if dtype.is_floating_point and dtype.itemsize > 1]
    return max(floats, key=floats.count, default=None)


__all__ = [
    "METHODS",
    "Dequantized",
    "dequantized",
    "dtype_before",
    "method",
    "quantization",
    "unquantized",
]
