"""Pairs under the names of a linear layer's that are on an embedding."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import DoraExportError, RunError
from ..model.base import BaseModel
from ..model.match import class_trained
from ..run import Run
from .peft_parameters import parameters
from .run_folder import RunFolder

# Of no numbered layer; for others the class need not be built, which takes a moment.
_OUTSIDE = re.compile(r"((?:(?!\.\d+\.).)+)\.lora_A\.weight")


def refuse_plain_pairs(run: Run, folder: RunFolder, file: Path, base: BaseModel | None) -> None:
    """Raise `RunError` where a module with `lora_A` is an embedding in the base's class.

    PEFT calls an embedding's factors `lora_embedding_A`, and leaves these out, but where they are
    of its weight as a parameter. Tinker's converter writes them for the head that is tied to the
    embedding, so that nothing tells what they are of.
    """
    modules = [match[1] for name in folder.adapter if (match := _OUTSIDE.fullmatch(name))]
    of_parameters = parameters(folder.adapter_config, modules, file)
    modules = [module for module in modules if module not in of_parameters]
    if base is None or not modules:
        return
    wrong: list[str] = []
    with suppress(DoraExportError):  # said where the class is needed
        names = class_trained(run, base).names
        layers = {} if names.model is None else dict(names.model.named_modules())
        found = {m: layers.get(names.module(m) or "") for m in modules}
        wrong = [m for m, layer in found.items() if isinstance(layer, torch.nn.Embedding)]
    if wrong:
        raise RunError(
            "an embedding with the factors of a linear layer, which PEFT leaves out",
            file=file,
            tensor=f"{wrong[0]}.lora_A.weight",
            expected=f"{wrong[0]}.lora_embedding_A",
            remedy="a Tinker run on a base with a tied head: merge it with tinker_cookbook's "
            "build_hf_model, and go on from that (`extract`); else train it with PEFT",
        )
