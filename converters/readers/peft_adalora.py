"""AdaLoRA adapters of PEFT."""

from __future__ import annotations

from pathlib import Path

from ..run import Run
from . import ReadOptions


class PeftAdaloraReader:
    """To be written."""

    name = "peft_adalora"
    looks_for = "nothing yet"

    def detect(self, path: Path) -> Path | None:
        return None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        raise NotImplementedError
