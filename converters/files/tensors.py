"""Lazy, safe reading of safetensors and torch files.

Opening a file reads and checks its table of contents only; tensor data is read when asked for.
Nothing is ever unpickled beyond plain tensors (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..errors import BaseError, TensorFileError
from .handles import State, check_file, opened, state_of
from .json_files import parse_json
from .json_files import read_json as read_json
from .pickles import refuse_filling

# https://github.com/huggingface/safetensors#format
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),  # since torch 2.7
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in reversed(SAFETENSORS_DTYPES.items())}
_MAX_AXES = 16
_MAX_HEADER = 100 << 20  # the limit of the safetensors library


class LazyTensor(Protocol):
    """A tensor whose name, shape and dtype are known and whose data is read on demand."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def load(self) -> torch.Tensor: ...
    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        """Fill the flat `buffer` (same dtype) with the elements from `start` on, row-major."""


LazyTensors = Mapping[str, LazyTensor]


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor seen as a matrix: the last axis are its columns."""
    columns = shape[-1] if shape else 1
    return (math.prod(shape) // columns if columns else 0), columns


def numel(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape)


def refuse_quantized(weight: LazyTensor) -> None:
    """Raise `BaseError` for a weight whose numbers mean nothing without scales beside them."""
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise BaseError(
            "a base weight of whole numbers, or of eight bits, cannot take an update",
            file=weight.path,
            tensor=weight.name,
            found=str(weight.dtype),
            remedy="merge into the base before it was quantized",
        )


def nbytes(tensor: LazyTensor) -> int:
    return numel(tensor) * tensor.dtype.itemsize


def byte_view(buffer: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return buffer.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor of a safetensors file that was in `state`; `offset` is its first byte there."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    state: State

    def load(self) -> torch.Tensor:
        flat = torch.empty(numel(self), dtype=self.dtype)
        self.read_into(flat, 0)
        return flat.view(self.shape)

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        position = self.offset + start * self.dtype.itemsize
        view = byte_view(buffer)
        with opened(self.path, self.state, self.name) as fd:
            while view:
                try:
                    count = os.preadv(fd, [view], position)
                except OSError as error:
                    raise TensorFileError(
                        f"cannot be read: {error.strerror}", file=self.path, tensor=self.name
                    ) from None
                if not count:
                    raise TensorFileError(
                        "the file ended while it was read",
                        file=self.path,
                        tensor=self.name,
                        remedy="was it changed by another process? copy it again",
                    )
                view, position = view[count:], position + count


@dataclass(frozen=True)
class TorchTensor:
    """One tensor of a torch file that was in `state`, memory-mapped by torch."""

    name: str
    path: Path
    data: torch.Tensor
    state: State

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def load(self) -> torch.Tensor:
        with opened(self.path, self.state, self.name):
            return self.data.clone(memory_format=torch.contiguous_format)

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        flat = self.data.reshape(-1)
        with opened(self.path, self.state, self.name):
            buffer.copy_(flat[start : start + buffer.numel()])


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file in file order, after its header was checked whole.

    Raises `TensorFileError` when header, dtypes, shapes, offsets and file size disagree.
    """

    def bad(message: str, **details: object) -> TensorFileError:
        remedy = "the file is damaged or incomplete: copy or download it again"
        tensor = details.pop("tensor", None)
        return TensorFileError(
            message,
            file=path,
            tensor=None if tensor is None else str(tensor),
            found=details.get("found"),
            expected=details.get("expected"),
            remedy=remedy,
        )

    check_file(path)
    try:
        with path.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            size = stat.st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise bad(
                    "safetensors header length is beyond the end of the file",
                    found=length,
                    expected=f"at most {max(0, size - 8)}",
                )
            raw = stream.read(length)
    except OSError as error:
        raise TensorFileError(f"cannot be read: {error.strerror}", file=path) from None
    try:
        if raw.count(b"data_offsets") > 200_000:  # the largest models' adapters have fewer
            raise ValueError("more than 200,000 tensors in a file")
        header = parse_json(raw)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise bad(f"safetensors header is not valid JSON: {error}") from None

    entries: list[SafetensorsTensor] = []
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if not all(type(n) is int and 0 <= n <= size for n in shape):
                raise ValueError  # an empty tensor may not claim more rows than the file has bytes
            if len(shape) > _MAX_AXES or math.prod(n or 1 for n in shape) >= 1 << 62:
                raise ValueError  # torch counts in 63 bits
            if not all(type(n) is int and n >= 0 for n in (begin, end)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise bad(
                "safetensors header entry is malformed or of an unknown dtype",
                tensor=name,
                found=str(entry)[:200],
                expected=f"dtype ({', '.join(SAFETENSORS_DTYPES)}), shape, data_offsets",
            ) from None
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(
                "tensor size does not match its shape and dtype",
                tensor=name,
                found=f"{end - begin} bytes",
                expected=f"{math.prod(shape) * dtype.itemsize} bytes for {list(shape)}",
            )
        entries.append(
            SafetensorsTensor(name, path, dtype, shape, 8 + length + begin, state_of(stat))
        )
        spans.append((begin, end, name))

    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise bad(
                "tensor data overlaps or leaves a gap",
                tensor=name,
                found=f"offset {begin}",
                expected=f"offset {position}",
            )
        position = end
    if 8 + length + position != size:
        raise bad(
            "file size does not match its header",
            found=f"{size} bytes",
            expected=f"{8 + length + position} bytes",
        )
    entries.sort(key=lambda tensor: (tensor.offset, nbytes(tensor)))
    return {tensor.name: tensor for tensor in entries}


def load_torch(path: Path) -> object:
    """What `torch.load(weights_only=True)` makes of `path`, memory-mapped where the format can be.

    Raises `TensorFileError` when the file holds anything but tensors and plain containers.
    """
    check_file(path)
    refuse_filling(path)
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise TensorFileError(
            "the file holds more than tensors, and nothing of it is executed",
            file=path,
            found=str(error)[:200].partition("\n")[0],
            expected="a dict of tensors saved by torch.save",
            remedy="if you trust it, load and save its tensors as safetensors yourself",
        ) from None
    except Exception as error:
        raise TensorFileError(
            "torch cannot read this file",
            file=path,
            found=f"{type(error).__name__}: {str(error)[:200].partition(chr(10))[0]}",
            expected="a dict of tensors saved by torch.save",
            remedy="the file is damaged or incomplete: copy or download it again",
        ) from None


def open_torch(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a torch state dict (`.bin`, `.pt`), in its own order."""
    saved = load_torch(path)
    state = state_of(path.stat())
    for key in ("state_dict", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict):
        kind = type(saved).__name__
        raise TensorFileError("not a state dict", file=path, found=kind, expected="named tensors")
    for name, value in saved.items():
        if not _is_text(name) or not _is_plain(value, state[2]):
            raise TensorFileError(
                "state dict entry is not a plain tensor of the file's size",
                file=path,
                tensor=str(name)[:200],
                found=_kind(value),
                expected="a dense tensor on the CPU",
            )
    return {name: TorchTensor(name, path, value.detach(), state) for name, value in saved.items()}


def _is_text(name: object) -> bool:
    """Whether it is text that a file can hold: without half a surrogate pair."""
    return isinstance(name, str) and not any("\ud800" <= sign <= "\udfff" for sign in name)


def _is_plain(value: object, size: int) -> bool:
    """Whether it is a whole dense tensor, no larger than the file it came from."""
    return (
        isinstance(value, torch.Tensor)
        and not hasattr(value, "placements")  # DTensor's, of which it is a shard
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPE_NAMES
        and not value.is_nested
        and value.numel() * value.itemsize <= size
        and all(n <= size for n in value.shape)
    )


def _kind(value: object) -> str:
    if not isinstance(value, torch.Tensor) or hasattr(value, "placements") or value.is_nested:
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)}, {value.layout}, on {value.device}"


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one `.safetensors` file, or of one that torch wrote (`.bin`, `.pt`, …)."""
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def open_files(paths: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of several files as one mapping; a name in two files is an error."""
    merged: dict[str, LazyTensor] = {}
    for path in paths:
        for name, tensor in open_file(path).items():
            if name in merged:
                raise TensorFileError(
                    "the tensor is in two files",
                    file=path,
                    tensor=name,
                    found=f"also in {merged[name].path}",
                    expected="one file",
                )
            merged[name] = tensor
    return merged


def load_finite(tensor: LazyTensor) -> torch.Tensor:
    """The data as float32, checked to hold no NaN and no infinity."""
    data = tensor.load()
    if not data.is_floating_point():
        raise TensorFileError(
            "not a floating-point tensor",
            file=tensor.path,
            tensor=tensor.name,
            found=str(data.dtype),
            expected="float32, float16 or bfloat16",
        )
    data = data.float()
    if not bool(torch.isfinite(data).all()):
        bad = int((~torch.isfinite(data)).sum())
        raise TensorFileError(
            "the tensor holds NaN or infinity",
            file=tensor.path,
            tensor=tensor.name,
            found=f"{bad} of {data.numel()} values",
            expected="finite values",
            remedy="the training run diverged, or the file is damaged: use an earlier checkpoint",
        )
    return data


def blocks(tensor: LazyTensor, elements: int = 1 << 20) -> Iterator[torch.Tensor]:
    """The flat data piece by piece; the yielded buffer is reused."""
    total = numel(tensor)
    buffer = torch.empty(min(elements, total), dtype=tensor.dtype)
    for start in range(0, total, elements):
        part = buffer[: min(elements, total - start)]
        tensor.read_into(part, start)
        yield part


def is_copy_of(tensor: LazyTensor, source: LazyTensor) -> bool:
    """Whether `tensor` is `source` in its own dtype: rounded where that is coarser."""
    return tensor.shape == source.shape and all(
        torch.equal(a, b.to(tensor.dtype))
        for a, b in zip(blocks(tensor), blocks(source), strict=True)
    )


def same_values(left: LazyTensor, right: LazyTensor) -> bool:
    """Whether both hold the same numbers once the finer one is rounded to the coarser dtype."""
    coarse, fine = sorted((left, right), key=lambda tensor: tensor.dtype.itemsize)
    return is_copy_of(coarse, fine)
