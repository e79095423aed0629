"""A LoRA adapter as a GGUF file, which llama.cpp loads with `--lora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ...errors import TargetError
from ..engines import PROFILES
from ..lora_folder import AdapterOptions, LoraFolder

if TYPE_CHECKING:
    from ...model.base import BaseModel
    from ...run import Run
    from .adapter import GgufPlan


class Gguf(LoraFolder):
    """A folder with one GGUF file, named like the folder."""

    name, profile = "gguf", PROFILES["gguf"]
    engines: tuple[str, ...] = ()

    def plan(self, run: Run, base: BaseModel | None, options: AdapterOptions) -> GgufPlan:
        from .adapter import plan_gguf

        return plan_gguf(super().plan(run, base, options))

    def holds(self, folder: Path) -> bool:
        return any(folder.glob("*.gguf"))

    def open(self, folder: Path, base: BaseModel, run: Run, engine: str) -> NoReturn:  # noqa: ARG002
        raise TargetError(
            "GGUF files are not read here",
            file=next(folder.glob("*.gguf"), folder),
            remedy="verify the same run's adapter for `target` peft",
        )
