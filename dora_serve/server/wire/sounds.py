"""Forms of several parts, and sounds in them, as clients of speech send both."""

from __future__ import annotations

import math
import struct
from email.message import Message
from email.parser import BytesParser
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ApiError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PARTS = 64
_HEAD = 2 << 10  # bytes before a part, or of a form: to read parameters takes their square
_HIGHEST = 384_000  # samples of a second
_WHOLE, _FLOATS, _EXTENSIBLE = 1, 3, 0xFFFE  # kinds of numbers; the last names one further on
_WIDTHS = {1: ("u1", 128.0, 128.0), 2: ("<i2", 0.0, 2.0**15), 4: ("<i4", 0.0, 2.0**31)}


def read_form(kind: str, body: bytes) -> dict[str, bytes]:
    """The parts of a `multipart/form-data` body by their names; up to a second of work. Raises
    `ApiError` for another."""
    if len(kind) > _HEAD:
        raise ApiError(f"the Content-Type has more than {_HEAD} bytes", code="not_a_form")
    said = Message()
    said["content-type"] = kind
    boundary = _parameter(said, "boundary", "content-type")
    if said.get_content_type() != "multipart/form-data" or boundary is None:
        raise ApiError("the Content-Type is not multipart/form-data", code="not_a_form")
    mark = b"\r\n--" + boundary.encode("latin-1", "replace")
    found: dict[str, bytes] = {}
    *pieces, end = (b"\r\n" + body).split(mark, _PARTS)[1:] or [b""]
    if not end.startswith(b"--"):
        raise ApiError(f"the form has no end, or {_PARTS} parts or more", code="not_a_form")
    for piece in pieces:
        head, apart, content = piece.partition(b"\r\n\r\n")
        if len(head) > _HEAD:
            raise ApiError(f"a part of the form has more than {_HEAD} bytes before it")
        name = _parameter(BytesParser().parsebytes(head.lstrip()), "name", "content-disposition")
        if apart and name is not None:
            found[name] = content
    return found


def _parameter(said: Message, name: str, header: str) -> str | None:
    """None where there is none, or parts of several kinds (RFC 2231) that are none together."""
    try:
        found = said.get_param(name, header=header)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None


def read_sound(file: bytes, rate: int, longest: int) -> NDArray[np.float32]:
    """The samples of a WAV file between -1 and 1, of all its channels together, `rate` of a second.
    Raises `ApiError` for another file, and for one of more than `longest` such samples."""
    try:
        kind, channels, own, bits, data = _wav(file)
        if not channels or not 0 < own <= _HIGHEST:
            raise ValueError(f"{channels} channels of {own} samples a second")
        values = _numbers(kind, -(-bits // 8), data)
    except (ValueError, struct.error) as error:
        raise ApiError(f"not a WAV file of plain numbers: {error}", param="file") from None
    values = values[: len(values) // channels * channels].reshape(-1, channels)
    if len(values) * rate > longest * own:
        raise ApiError(
            f"the sound is longer than the {longest / rate:g} s that are heard at once",
            param="file",
            code="too_long",
        )
    heard: NDArray[np.float32] = _resampled(values.mean(axis=1, dtype=np.float64), own, rate)
    return heard.astype(np.float32)


def _wav(file: bytes) -> tuple[int, int, int, int, memoryview]:
    """The kind of numbers, channels, samples of a second, bits of a number, and the numbers. Who
    writes into a pipe cannot say how many there are: at most so many as there are."""
    if file[:4] != b"RIFF" or file[8:12] != b"WAVE":
        raise ValueError("it does not begin as one")
    at, form = 12, b""
    while at + 8 <= len(file):
        name, size = struct.unpack_from("<4sI", file, at)
        content = memoryview(file)[at + 8 : at + 8 + size]
        if name == b"fmt ":
            form = bytes(content)
        elif name == b"data":
            kind, channels, own, _, step, bits = struct.unpack_from("<HHIIHH", form)
            if kind == _EXTENSIBLE:
                (kind,) = struct.unpack_from("<H", form, 24)
            if kind in (_WHOLE, _FLOATS) and step != channels * -(-bits // 8):
                # Programs differ in where the bits lie then.
                raise ValueError(f"{step} bytes for {channels} numbers of {bits} bits")
            return kind, channels, own, bits, content
        at += 8 + size + size % 2
    raise ValueError("it has no samples")


def _numbers(kind: int, width: int, data: memoryview) -> Any:
    """Between -1 and 1."""
    data = data[: len(data) // max(width, 1) * width]
    if kind == _FLOATS and width in (4, 8):
        return np.frombuffer(data, f"<f{width}")
    if kind != _WHOLE or width not in (*_WIDTHS, 3):
        raise ValueError(f"numbers of {width} bytes, of kind {kind}")
    if width == 3:  # the upper three of four bytes
        filled = np.zeros((len(data) // 3, 4), np.uint8)
        filled[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = memoryview(filled.tobytes()), 4
    form, middle, scale = _WIDTHS[width]
    values = np.frombuffer(data, form).astype(np.float64)
    values -= middle
    values /= scale
    return values


def _resampled(samples: Any, own: int, rate: int) -> Any:
    """What both rates can tell of `samples`, at the other one."""
    count = round(len(samples) * rate / own)
    if own == rate or not count:
        return samples[:count]
    step = own // math.gcd(own, rate)  # so many are whole samples of the other rate too
    step = step if _quick(step) == step else 1
    filled = step * _quick(-(-len(samples) // step))
    others = round(filled * rate / own)
    return (np.fft.irfft(np.fft.rfft(samples, filled), others) * (others / filled))[:count]


def _quick(count: int) -> int:
    """The next length that has small factors alone: others take ten times the memory."""
    odd = [int(3**i * 5**j * 7**k) for i in range(10) for j in range(7) for k in range(3)]
    return min(each << (-(-count // each) - 1).bit_length() for each in odd)
