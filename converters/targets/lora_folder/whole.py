"""How tensors trained whole are named in a LoRA adapter's configuration."""

from __future__ import annotations

from collections.abc import Mapping

from ...files.tensors import LazyTensor
from ...model.base import BaseModel
from ...run import Run


def whole_modules(
    run: Run, base: BaseModel | None, whole: Mapping[str, LazyTensor]
) -> tuple[list[str], list[str]]:
    """Modules to save whole, and biases trained beside frozen weights.

    A head is named by its outermost module (`classifier`), as PEFT and vLLM do; a module inside
    the body, where the base keeps other tensors as they were, by its own name.
    """
    bodies = {module.split(".", 1)[0] for module in run.updates} | _kept(base, whole)
    modules: dict[str, None] = {}
    biases = []
    for name in whole:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in run.updates:
            continue  # resized and adapted: stored as the module's base layer
        if name.split(".", 1)[0] not in bodies:
            modules[name.split(".", 1)[0]] = None
        elif kind == "bias" and f"{module}.weight" not in whole:
            biases.append(name)
        else:
            modules[module] = None
    return list(modules), biases


def _kept(base: BaseModel | None, whole: Mapping[str, LazyTensor]) -> set[str]:
    """The outermost modules of the base, with and without its prefix, that keep a tensor."""
    endings = tuple(f".{name}" for name in whole)
    names = base.tensors if base is not None else ()
    kept = [name for name in names if not f".{name}".endswith(endings)]
    return {part for name in kept for part in name.split(".")[:2]}
