"""Gated LoRA: ALoRA, SoRA and any gate vector."""

from __future__ import annotations

from pathlib import Path

from ..run import Run
from . import ReadOptions


class GatedLoraReader:
    """To be written."""

    name = "gated"
    looks_for = "nothing yet"

    def detect(self, path: Path) -> Path | None:
        return None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        raise NotImplementedError
