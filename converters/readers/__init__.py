"""Readers: one file per training method. A reader registers under `dora_serve.readers`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, TypeGuard

from ..errors import MissingError, RunError
from ..files.handles import reading, there
from ..options import ReadOptions as ReadOptions
from ..run import Run
from .run_folder import RunFolder as RunFolder


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that float32 can hold, neither NaN nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Reader(Protocol):
    """Reads the runs of one training method."""

    name: str
    looks_for: str

    def detect(self, folder: RunFolder) -> RunFolder | None:
        """The run's own folder, `folder` or one below it; None when it is not this method's."""

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        """The run in `folder`, as returned by `detect`."""


def readers() -> list[Reader]:
    """Every installed reader, by name."""
    points = sorted(entry_points(group="dora_serve.readers"), key=lambda point: point.name)
    return [point.load()() for point in points]


def is_run(path: Path, known: Sequence[Reader] | None = None) -> bool:
    """Whether one of the readers `known` (default: all) takes the folder `path` for a run."""
    folder = RunFolder(path)
    return any(reader.detect(folder) is not None for reader in known or readers())


def detect(path: Path, method: str | None = None) -> tuple[Reader, RunFolder]:
    """The reader of the run at `path` (or the one named `method`), and the run's own folder.

    Raises `MissingError` when nothing is there, `RunError` when no reader or more than one fits.
    """
    if not path.exists():
        raise MissingError(
            "no such run", file=path, remedy="give the checkpoint, task or adapter folder"
        )
    if not path.is_dir():
        raise RunError("a run is a folder", file=path, found="a file", remedy="give its folder")
    known = [reader for reader in readers() if method in (None, reader.name)]
    if not known:
        raise RunError(
            "no such method", found=method, expected=", ".join(reader.name for reader in readers())
        )
    folder = RunFolder(path)
    hits = [(reader, found) for reader in known if (found := reader.detect(folder)) is not None]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise RunError(
            "the folder holds runs of several methods",
            file=path,
            found=", ".join(f"{reader.name} in {found.path}" for reader, found in hits),
            remedy="name one of these folders, or the method with `method`",
        )
    content = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
    looked = "".join(f"\n    {reader.name}: {reader.looks_for}" for reader in known)
    raise RunError("no run found in this folder", file=path, found=content, expected=looked)


def read_run(path: str | Path, options: ReadOptions | None = None) -> Run:
    """Read the run at `path`: a checkpoint folder, the task folder above it, an adapter folder,
    or a hub id that is in the local cache.

    Only tables of contents are read; tensor data follows when it is used.
    """
    folder = Path(path)
    if not there(folder) and _HUB_ID.fullmatch(str(path)):
        folder = _cached_run(str(path))
    options = options or ReadOptions()
    if options.lora_alpha is not None and not is_number(options.lora_alpha):
        raise RunError("lora_alpha is not a finite number", found=options.lora_alpha)
    with reading(folder, RunError):
        reader, found = detect(folder, options.method)
        run = replace(reader.read(found, options), method=reader.name)
        if options.parts:
            from .parts import read_parts

            run = read_parts(run, options)
        from .promises import checked

        run = checked(run, found, options)
    if not run.updates and not run.replaced:
        raise RunError("the run adapted nothing", file=run.path)
    return run


def _cached_run(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:
        raise MissingError(
            "no such run: neither a folder nor in the local hub cache",
            file=name,
            remedy=f"give a folder, or fetch it first: hf download {name}",
        ) from None
