"""One file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from uuid import uuid4

from converters.errors import OutputError
from converters.files.handles import there


def check_output_file(path: Path, force: bool) -> None:
    """Raise `OutputError` when `path` may not or cannot be written, before anything is computed."""
    if there(path) and not path.is_file():
        raise OutputError(
            "the output is there and is no file", file=path, expected="a file to make"
        )
    if there(path) and not force:
        raise OutputError(
            "the output is there already",
            file=path,
            remedy="choose another, or pass `force` to replace it",
        )
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise OutputError("no such folder, or no permission to write to it", file=path.parent)


def check_apart(path: Path, inputs: Iterable[Path]) -> None:
    """Raise `OutputError` when `path` is one of the files `inputs`, or lies in a folder of them, as
    a file that is there or a new one."""
    for source in inputs:
        same = there(path) and any(
            there(file) and path.samefile(file) for file in chain([source], source.rglob("*"))
        )
        if same or source.resolve() in path.resolve().parents:
            raise OutputError(
                "the output would replace an input, or lie inside one",
                file=path,
                found=f"input {source}",
                remedy="choose another place",
            )


def write_file(path: Path, data: bytes, force: bool = False) -> None:
    """Put `data` into the file `path` in one step; a file that is there is replaced with `force`
    only. Raises `OutputError` when it is not written, and then leaves nothing behind."""
    check_output_file(path, force)
    target = path.resolve()
    fresh = target.with_name(f".{uuid4().hex}.dora-tmp")
    try:
        with fresh.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        check_output_file(path, force)  # what came there meanwhile stays
        fresh.replace(target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"writing failed: {error.strerror}", file=path) from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()
