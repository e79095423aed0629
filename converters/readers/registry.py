"""The readers that are installed, and which of them a folder is for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from ..certificate import FILE as CERTIFICATE
from ..errors import MissingError, RunError
from ..options import ReadOptions
from ..run import Run
from .run_folder import RunFolder

_LOOK = 1000  # folders that are looked through for a run, where a folder is none


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
    looked = "; ".join(f"{reader.name}: {reader.looks_for}" for reader in known[:2])
    several = f"what a run of one of these holds: {', '.join(reader.name for reader in known)}"
    raise RunError(
        "no run found in this folder",
        file=path,
        found=content,
        expected=several if len(known) > 2 else looked,
        remedy=_instead(path),
    )


def _instead(path: Path) -> str:
    """What to do with a folder that is no run, by what it is."""
    if (path / CERTIFICATE).is_file():
        return "this is what was made of a run: give the run, or look at this one with `check`"
    if (path / "config.json").is_file():
        return "this looks like a model: give it as `base`, or make a run of it with `extract`"
    run = _run_below(path)
    if run is not None:
        return f"give one of the runs below, such as {run}; `batch` converts all"
    return "give the checkpoint, task or adapter folder that training wrote"


def _run_below(path: Path) -> Path | None:
    """A folder below `path` that looks like a run, if one is soon found."""
    folders = [path]
    for folder in folders:
        with suppress(OSError):
            inside = sorted(each for each in folder.iterdir() if each.is_dir())
            for each in inside:
                if each.name == "checkpoint" or (each / "adapter_config.json").is_file():
                    return folder if each.name == "checkpoint" else each
            folders += inside[: max(0, _LOOK - len(folders))]
    return None
