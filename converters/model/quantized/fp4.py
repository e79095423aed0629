"""Four-bit floats, E2M1: MXFP4 of gpt-oss, and what other formats share with it.

gpt-oss, `experts.gate_up_proj_blocks [E, out, in/32, 16]` uint8, two values a byte, the low nibble
first, and `…_scales [E, out, in/32]` uint8, 2^(s − 127): in memory, and unquantized on disk, that
is `experts.gate_up_proj [E, in, out]`.
Source: transformers `integrations/mxfp4.py` (convert_moe_packed_tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...errors import BaseError
from ...files.tensors import LazyTensor
from .tensor import Packed, Parts, check_shape, exponents, piece

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat((_E2M1, -_E2M1))
_BLOCKS = "_blocks"


def nibbles(data: torch.Tensor) -> torch.Tensor:
    """The values of packed bytes, flat, the low nibble first, float32."""
    return VALUES[torch.stack((data & 15, data >> 4), dim=1).flatten().long()]


def packed(parts: Parts, _said: Mapping[str, object]) -> Iterator[Packed]:
    """The experts' weights among `parts`. Raises `BaseError` for one without its scales."""
    for name, blocks in parts.tensors.items():
        if name.endswith(_BLOCKS):
            yield _experts(parts, blocks, name.removesuffix(_BLOCKS))


def _experts(parts: Parts, blocks: LazyTensor, name: str) -> Packed:
    scales = parts.need(f"{name}_scales", blocks)
    if len(blocks.shape) != 4 or blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise BaseError(
            "a weight in MXFP4 is not of its format",
            file=blocks.path,
            tensor=blocks.name,
            found=f"{blocks.dtype} {list(blocks.shape)}, scales {scales.dtype}",
            expected="bytes, [experts, out, in / 32, 16]",
        )
    check_shape(scales, blocks.shape[:3])
    experts, out, groups, half = blocks.shape
    inn, size = groups * half * 2, out * groups

    def rows(start: int, stop: int) -> torch.Tensor:
        first, last = start // inn, stop // inn
        values = nibbles(piece(blocks, first * size * half, last * size * half))
        scale = exponents(scales, first * size, last * size)
        found = (values.view(-1, half * 2) * scale[:, None]).view(last - first, out, inn)
        return found.transpose(1, 2).reshape(-1, out)

    return Packed(blocks.name, name, blocks.path, (experts, inn, out), rows, step=inn)
