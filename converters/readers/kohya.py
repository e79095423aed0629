"""LoRA on text encoders in the form of kohya-ss/sd-scripts (`networks/lora.py`): one safetensors
file with `lora_te_X.{lora_down.weight [r, in], lora_up.weight [out, r], alpha}`.

ΔW = (alpha / r)·up·down; without alpha, or with 0, alpha is r. Which module X is the base tells:
the one whose name has dots where this has underscores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..errors import DoraExportError, RunError
from ..files.tensors import numel
from ..model.base import BaseModel
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.update import Update
from .module import AdaptedModule, grouped
from .peft_common import need_base
from .run_folder import RunFolder

_TEXT = re.compile(r"(lora_te[123]?_.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B"}
_PREFIX = re.compile(r"lora_te[123]?_")
_INNER = "text_model."
_OTHER_FILES = re.compile(r"(model|adapter|pytorch_model|diffusion_pytorch_model|optimizer).*")


class KohyaReader:
    """Reads the folder of a file; needs the text encoder as base."""

    name = "kohya"
    looks_for = "a .safetensors file whose tensors begin with lora_te"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if _files(folder) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        file = folder.only(_files(folder), "several files of LoRA")
        modules, rest = grouped(folder.tensors(file), _TEXT, _PARTS)
        encoders = {prefix[0] for name in modules if (prefix := _PREFIX.match(name))}
        if rest or len(encoders) > 1:
            raise RunError(
                "the file has updates of more than one model",
                file=file,
                found=", ".join([*sorted(encoders), *list(rest)[:2]]),
                expected="LoRA on one text encoder alone",
                remedy="merge it with sd-scripts (networks/merge_lora.py), or split it by these "
                "prefixes",
            )
        base = need_base(options, "names with underscores", file)
        names = _modules(base)
        updates: dict[str, Callable[[], Update]] = {}
        start_rank, shapes = {}, {}
        for name, module in modules.items():
            flat = _PREFIX.sub("", name, count=1)
            own = names.get(flat, [])
            if len(own) != 1 or own[0] in updates:
                raise RunError(
                    "the base has no module of this name, several, or one that another name is for",
                    file=file,
                    tensor=name,
                    found=", ".join(own) or None,
                    expected="a module of the base, with underscores for dots",
                    remedy="is this the text encoder that it was trained on? pass it with `base`",
                )
            start_rank[own[0]] = module.pair(("lora_down", "lora_up"))
            shapes[own[0]] = module.shape
            updates[own[0]] = partial(_update, module, start_rank[own[0]])
        return Run(
            path=folder.path,
            method=self.name,
            updates=LazyUpdates(updates, shapes),
            start_rank=start_rank,
            files=(file,),
        )


def _files(folder: RunFolder) -> list[Path]:
    found = []
    for path in sorted(folder.path.glob("*.safetensors")):
        if not _OTHER_FILES.fullmatch(path.name):
            with suppress(DoraExportError):  # what is damaged is nobody's
                if any(_TEXT.fullmatch(name) for name in folder.tensors(path)):
                    found.append(path)
    return found


def _modules(base: BaseModel) -> dict[str, list[str]]:
    """Name with underscores → the modules that it may be. CLIP's text model lay in `text_model`
    before transformers 5."""
    names: dict[str, list[str]] = {}
    for tensor in base.tensors:
        if tensor.endswith(".weight"):
            module = tensor.removesuffix(".weight")
            inner = module.removeprefix(_INNER)
            for name in {module, inner, _INNER + inner}:
                names.setdefault(name.replace(".", "_"), []).append(module)
    return names


def _update(module: AdaptedModule, rank: int) -> Update:
    alpha = float(rank)
    if "alpha" in module.parts:
        stored = module.parts["alpha"]  # of whole numbers in some files
        alpha = float(stored.load()) or alpha if numel(stored) == 1 else math.nan
        if not math.isfinite(alpha):
            raise module.error("alpha is not one finite number", "alpha")
    return module.sum(alpha / max(1, rank))
