"""Weight-decomposed DoRA adapters of PEFT (`use_dora`)."""

from __future__ import annotations

from pathlib import Path

from ..run import Run
from . import ReadOptions


class PeftDoraReader:
    """To be written."""

    name = "peft_dora"
    looks_for = "nothing yet"

    def detect(self, path: Path) -> Path | None:
        return None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        raise NotImplementedError
