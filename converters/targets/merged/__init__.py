"""The merged model: a Hugging Face folder that `from_pretrained` loads, with the base's shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import TargetError
from ...options import DTYPES, option
from ..target import Target

if TYPE_CHECKING:
    from ...model.base import BaseModel
    from ...run import Run
    from .plan import MergePlan


@dataclass(frozen=True)
class MergeOptions:
    """None keeps each tensor's dtype. `requantize`: what the base holds in float8 by blocks is
    written so."""

    dtype: str | None = option(None, "Output dtype; default: the base's.", choices=DTYPES)
    requantize: bool = option(
        False, "Into a base in float8 by blocks: write such blocks again, with fresh scales."
    )


class Merged(Target):
    """A model without any adapter."""

    name = "merged"
    kind = "model"
    options = MergeOptions
    engines = ("transformers", "vllm")

    def plan(self, run: Run, base: BaseModel | None, options: MergeOptions) -> MergePlan:
        import torch

        from .plan import plan_merge

        if base is None:
            raise TargetError(
                "a merged model is made of its base", file=run.path, remedy="pass it with `base`"
            )
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        return plan_merge(run, base, dtype, requantize=options.requantize)

    def holds(self, folder: Path) -> bool:
        weights = any(next(folder.glob(p), None) for p in ("*.safetensors", "*.bin"))
        return weights and (folder / "config.json").is_file()
