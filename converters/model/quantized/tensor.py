"""Float tensors that are made of packed ones while they are read, block of rows by block."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from ...errors import BaseError
from ...files.tensors import LazyTensor, LazyTensors, numel, rows_and_columns

Rows = Callable[[int, int], torch.Tensor]


class Parts:
    """The tensors of a base's files. `used`: those that are parts of packed weights."""

    def __init__(self, tensors: LazyTensors) -> None:
        self.tensors = tensors
        self.used: set[str] = set()

    def take(self, name: str) -> LazyTensor | None:
        """The tensor `name` as a part of a packed weight; None where there is none."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            self.used.add(name)
        return tensor

    def need(self, name: str, of: LazyTensor) -> LazyTensor:
        """As `take`; raises `BaseError` where the packed weight `of` lacks it."""
        tensor = self.take(name)
        if tensor is None:
            raise BaseError(
                "a quantized weight lacks a part of it",
                file=of.path,
                tensor=of.name,
                expected=name,
                remedy="the base is damaged: download it again",
            )
        return tensor


@dataclass(frozen=True)
class Dequantized:
    """A float32 tensor of a packed weight.

    `rows(start, stop)` gives those rows of it, the last axis its columns, float32; `step` of them,
    or a multiple, are dequantized at a time. `before`: the dtype before it was quantized. `path`:
    the file of its largest part.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    before: torch.dtype
    rows: Rows
    step: int = 1
    dtype: torch.dtype = field(default=torch.float32, init=False)

    def load(self) -> torch.Tensor:
        flat = torch.empty(numel(self))
        self.read_into(flat, 0)
        return flat.view(self.shape)

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        total, columns = rows_and_columns(self.shape)
        if not buffer.numel():
            return
        first = start // columns // self.step * self.step
        last = min(total, math.ceil((start + buffer.numel()) / columns / self.step) * self.step)
        flat = self._piece(first, last).reshape(-1)
        begin = start - first * columns
        buffer.copy_(flat[begin : begin + buffer.numel()])

    def flipped(self) -> Dequantized:
        """The transposed matrix, `[in, out]`."""
        turned = self.shape[::-1]
        return replace(
            self, shape=turned, rows=lambda a, b: self.load().T[a:b].contiguous(), step=turned[0]
        )

    def _piece(self, first: int, last: int) -> torch.Tensor:
        if self.step == 1:
            return self.rows(first, last)
        return held((self.rows, first, last), lambda: self.rows(first, last))


_last = threading.local()
_Made = TypeVar("_Made")


def held(key: object, make: Callable[[], _Made]) -> _Made:
    """What `make` makes; this thread's last stays in memory, for one who reads it in pieces."""
    if getattr(_last, "key", None) != key:
        _last.key = _last.value = None
        _last.value = make()
        _last.key = key
    value: _Made = _last.value
    return value


@dataclass(frozen=True)
class Packed:
    """A packed weight: `main` is its largest part in the files, the others as in `Dequantized`."""

    main: str
    name: str
    path: Path
    shape: tuple[int, ...]
    rows: Rows
    step: int = 1

    def tensor(self, before: torch.dtype) -> Dequantized:
        return Dequantized(self.name, self.path, self.shape, before, self.rows, self.step)


def piece(tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """The elements `start` to `stop` of a tensor, flat."""
    data = torch.empty(stop - start, dtype=tensor.dtype)
    tensor.read_into(data, start)
    return data


def floats(tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """As `piece`, in float32 and checked to be finite: what is wrong in one number of a scale is
    wrong in a whole block of weights."""
    data = piece(tensor, start, stop).float()
    if not bool(torch.isfinite(data).all()):
        raise BaseError(
            "a quantized weight has a scale that is no finite number",
            file=tensor.path,
            tensor=tensor.name,
            remedy="the base is damaged: download it again",
        )
    return data


def exponents(scale: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """Elements of a scale, float32; of one of bytes two to the power of each."""
    if scale.dtype == torch.uint8:
        return (piece(scale, start, stop).float() - 127).exp2()
    return floats(scale, start, stop)


def whole(tensor: LazyTensor) -> torch.Tensor:
    """All elements as `floats` gives them, in the tensor's shape."""
    return floats(tensor, 0, numel(tensor)).view(tensor.shape)


def check_shape(tensor: LazyTensor, *expected: tuple[int, ...]) -> None:
    """Raise `BaseError` where the tensor has none of the `expected` shapes."""
    if tensor.shape not in expected:
        raise BaseError(
            "a part of a quantized weight has another shape than its weight needs",
            file=tensor.path,
            tensor=tensor.name,
            found=list(tensor.shape),
            expected=" or ".join(str(list(shape)) for shape in expected),
            remedy="the base is damaged, or quantized in a way that is not known",
        )


def number(said: Mapping[str, object], key: str, low: int, high: int) -> int:
    """The whole number `key` of a format's description, within bounds; else `ValueError`."""
    value = said.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key} is {value}")
    return value


def unknown(parts: Parts, found: str, expected: str) -> BaseError:
    """The error for a format of which this variant is not known."""
    tensor = next(iter(parts.tensors.values()))
    return BaseError(
        "the base is quantized in a variant that is not known here",
        file=tensor.path,
        found=found,
        expected=expected,
        remedy="merge into the base before it was quantized, or deploy an adapter (`adapter`)",
    )
