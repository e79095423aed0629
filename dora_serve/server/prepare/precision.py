"""In which precision a base is served where nobody says it."""

from __future__ import annotations

from converters.files.memory import memory
from converters.files.tensors import numel
from converters.model.base import BaseModel

AUTO = "auto"
_SHARE = 4  # of the memory: a base's weights may take one such part of it
_BITS = {"fp32": 32, "int8": 10}  # of a weight; with 8 bits a scale of 32 for 16 weights


def chosen(base: BaseModel) -> str:
    """The most exact precision in which the base's weights take a quarter of the memory at most, or
    int4."""
    weights, room = sum(map(numel, base.tensors.values())), memory() // _SHARE
    fits = (name for name, bits in _BITS.items() if weights * bits <= 8 * room)
    return next(fits, "int4")
