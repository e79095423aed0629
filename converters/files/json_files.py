"""JSON files, read with errors that name the file. Imports nothing heavy."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

from ..errors import TensorFileError
from .handles import check_file

_LARGEST = 100_000_000
_SMALL = 1_000_000


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`; raises `TensorFileError` naming the file when it is not one."""
    size = check_file(path)
    if not size:  # reading what the kernel makes up (/proc/kmsg) may never end
        raise TensorFileError("not valid JSON: the file is empty", file=path)
    if size > _LARGEST:
        raise TensorFileError("too large for a JSON file", file=path, expected="at most 100 MB")
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise TensorFileError(f"cannot be read: {error.strerror}", file=path) from None
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"not valid JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise TensorFileError(
            "not a JSON object", file=path, found=type(value).__name__, expected="an object"
        )
    return value


def read_objects(path: Path) -> list[dict[str, object]] | None:
    """The list of JSON objects in the small file `path`; None where it is none."""
    with suppress(ValueError, RecursionError):
        value = parse_json(path.read_bytes()) if path.stat().st_size <= _SMALL else None
        if isinstance(value, list) and all(isinstance(each, dict) for each in value):
            return value
    return None


def parse_json(raw: bytes) -> object:
    """The value of JSON that is text throughout and has every key once; raises `ValueError` or
    `RecursionError`."""
    value: object = json.loads(raw, object_pairs_hook=unique_keys)
    if not raw.isascii() or b"\0" in raw or b"\\ud" in raw.lower():
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return value


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that float32 can hold, neither NaN nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38
