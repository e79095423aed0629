"""The readers that are installed, and which of them a folder is for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from ..errors import DoraExportError, MissingError, RunError
from ..options import ReadOptions
from ..run import Run
from .no_run import no_run
from .run_folder import RunFolder

_LOOK = 500  # folders that are looked through for runs, where a folder is none


class Reader(Protocol):
    """Reads the runs of one training method. A reader may also have `over`, the names of those
    whose files it reads better where both find something."""

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
            "no such run: there is no such path",
            file=path,
            remedy="give the checkpoint, task or adapter folder",
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
    beneath = {name for reader, _ in hits for name in getattr(reader, "over", ())}
    hits = [(reader, found) for reader, found in hits if reader.name not in beneath]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise RunError(
            "the folder holds runs of several methods",
            file=path,
            found=", ".join(f"{reader.name} in {found.path}" for reader, found in hits),
            remedy="name one of these folders, or the method with `method`",
        )
    raise no_run(folder, {reader.name: reader.looks_for for reader in known}, runs_below(path))


def runs_below(path: Path) -> list[Path]:
    """The folders below `path` that hold a run, as far as they are soon found."""
    known, folders = readers(), [path]
    found: list[Path] = []
    for folder in folders:
        inside: list[Path] = []
        with suppress(OSError):
            inside = sorted(each for each in folder.iterdir() if each.is_dir())
        for below in inside[: _LOOK - len(folders)]:
            with suppress(DoraExportError, OSError):
                (found if is_run(below, known) else folders).append(below)
    return found
