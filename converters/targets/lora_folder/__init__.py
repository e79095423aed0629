"""A compact LoRA adapter of different rank per module, as a PEFT folder: one target per engine.

An engine that reads such a folder in a way of its own is a `Profile` and a class of two lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...options import DTYPES, option
from ..engines import PROFILES
from ..target import Target
from .names import CONFIG as CONFIG
from .names import WEIGHTS as WEIGHTS

if TYPE_CHECKING:
    from ...model.base import BaseModel
    from ...run import Run
    from .adapter import AdapterPlan


@dataclass(frozen=True)
class AdapterOptions:
    """How the factors are stored."""

    dtype: str = option("float32", "Dtype of the stored factors.", choices=DTYPES)


class LoraFolder(Target):
    """PEFT's folder, for the engine of `profile`."""

    kind = "adapter"
    options = AdapterOptions
    engines: tuple[str, ...] = ("peft", "vllm")

    def plan(self, run: Run, base: BaseModel | None, options: AdapterOptions) -> AdapterPlan:
        import torch

        from .adapter import plan_adapter

        assert self.profile is not None
        return plan_adapter(run, base, self.profile, getattr(torch, options.dtype))

    def holds(self, folder: Path) -> bool:
        """A folder that names no engine is PEFT's."""
        return self.name == "peft" and (folder / CONFIG).is_file()


class Peft(LoraFolder):
    name, profile = "peft", PROFILES["peft"]


class Vllm(LoraFolder):
    name, profile = "vllm", PROFILES["vllm"]


class Sglang(LoraFolder):
    name, profile = "sglang", PROFILES["sglang"]


class Lorax(LoraFolder):
    name, profile = "lorax", PROFILES["lorax"]
