"""MoRA (kongds/MoRA)."""

from __future__ import annotations

from pathlib import Path

from ..run import Run
from . import ReadOptions


class MoraReader:
    """To be written."""

    name = "mora"
    looks_for = "nothing yet"

    def detect(self, path: Path) -> Path | None:
        return None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        raise NotImplementedError
