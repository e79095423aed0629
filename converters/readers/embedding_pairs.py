"""Pairs under the names of a linear layer's that are on an embedding."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import DoraExportError, RunError
from ..files.tensors import LazyTensors
from ..model.base import BaseModel
from ..model.match import class_trained
from ..run import Run

# Of no numbered layer; for others the class need not be built, which takes a moment.
_OUTSIDE = re.compile(r"((?:(?!\.\d+\.).)+)\.lora_A\.weight")


def refuse_plain_pairs(run: Run, tensors: LazyTensors, file: Path, base: BaseModel | None) -> None:
    """Raise `RunError` where a module with `lora_A` is an embedding in the base's class.

    PEFT calls an embedding's factors `lora_embedding_A`, and leaves these out. Tinker's converter
    writes them for the head that is tied to the embedding, so that nothing tells what they are of.
    """
    modules = [match[1] for name in tensors if (match := _OUTSIDE.fullmatch(name))]
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
