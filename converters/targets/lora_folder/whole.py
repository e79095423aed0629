"""How tensors trained whole are named in a LoRA adapter's configuration, and stored in its file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

import torch

from ...errors import TargetError, some
from ...files.tensors import LazyTensor, load_finite
from ...model.base import BaseModel
from ...model.layout import Layout
from ...model.tasks import HEADS
from ...model.tying import aliases
from ...run import Run
from ..engines import Profile

_T = TypeVar("_T")


def whole_modules(
    run: Run, base: BaseModel | None, whole: Mapping[str, LazyTensor], layout: Layout | None
) -> tuple[list[str], list[str]]:
    """Modules to save whole, and biases trained beside frozen weights.

    A head is named by its outermost module (`classifier`), as PEFT and vLLM do; a module inside
    the body, where the base keeps other tensors as they were, by its own name; so is what is inside
    of a module whose name PEFT would find again in theirs (`embeddings`, `word_embeddings`).
    """
    bodies = {module.split(".", 1)[0] for module in run.updates} | _kept(base, whole)
    bodies |= {
        own
        for name in module_names(layout)
        if name.endswith(own := name.split(".", 1)[0]) and name != own
    }
    heads = {name.split(".", 1)[0] for name in whole if not name.endswith(".bias")} - bodies
    modules: dict[str, None] = {}
    biases = []
    for name in whole:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in run.updates:
            continue  # resized and adapted: stored as the module's base layer
        outermost = name.split(".", 1)[0]
        if outermost in heads or (outermost not in bodies and base is None):
            modules[outermost] = None
        elif kind == "bias" and (module in run.updates or f"{module}.weight" not in whole):
            biases.append(name)
        else:
            modules[module] = None
    # One inside of another goes with it: PEFT wraps what an entry names once.
    return [m for m in modules if not any(f".{other}." in f".{m}" for other in modules)], biases


def narrowed(tensor: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
    """The data as an adapter of `dtype` has it: whole numbers as they are. Raises `TargetError` for
    values beyond that dtype, which would be infinite in the file."""
    if not tensor.dtype.is_floating_point:
        return tensor.load()
    data = load_finite(tensor)
    narrow = data.to(dtype)
    if narrow is not data and not bool(narrow.isfinite().all()):
        raise TargetError(
            "a tensor that was trained whole is beyond the range of the adapter's dtype",
            file=tensor.path,
            tensor=tensor.name,
            found=f"values up to {float(data.abs().max()):.3g}",
            expected=f"within {dtype}",
            remedy="use `dtype` float32",
        )
    return narrow


def module_names(layout: Layout | None) -> list[str]:
    """The names of the modules of the class that is loaded; none where it is not known."""
    model = None if layout is None else layout.names.model
    return [] if model is None else [name for name, _ in model.named_modules()]


def _kept(base: BaseModel | None, whole: Mapping[str, LazyTensor]) -> set[str]:
    """The outermost modules of the base, with and without its prefix, that keep a tensor."""
    endings = tuple(f".{name}" for name in whole)
    names = base.tensors if base is not None else ()
    kept = [name for name in names if not f".{name}".endswith(endings)]
    return {part for name in kept for part in name.split(".")[:2]}


def with_heads(
    run: Run, base: BaseModel | None, whole: Mapping[str, LazyTensor], profile: Profile
) -> dict[str, LazyTensor]:
    """`whole` with the head of a classifier, which PEFT expects of the adapter, trained or not;
    where the engine takes heads at all."""
    heads = [
        name
        for name in HEADS.get(run.task or "", ())
        if profile.whole_modules is None or name in profile.whole_modules
    ]
    known = {**({} if base is None else base.tensors), **run.replaced}
    return {**{n: t for n, t in known.items() if n.split(".", 1)[0] in heads}, **whole}


def completed(
    base: BaseModel | None,
    run: Run,
    whole: Mapping[str, LazyTensor],
    modules: Collection[str],
    layout: Layout | None,
) -> dict[str, LazyTensor]:
    """`whole` with what training left as it was of `modules`, as the run holds it or the base, what
    is tied to another included: PEFT loads a module whole or not at all."""
    result = dict(whole)
    model = None if layout is None else layout.names.model
    one = {} if model is None else aliases(model)
    # PEFT finds each name at the end of whatever others (`norm`, `input_layernorm`).
    found = [name for name in module_names(layout) if name.endswith(tuple(modules))]
    for module in dict.fromkeys([*modules, *found]):
        result = {**_inside(module, run.replaced), **result}
        if base is None or layout is None:
            continue
        for name in _inside(module, whole):
            kind = name[len(module) :]
            stored = base.find(name) or ""
            if stored.endswith(kind):
                stem = stored.removesuffix(kind)
                beside = _inside(stem, base.tensors)
                named = {module + other[len(stem) :]: t for other, t in beside.items()}
                result = {**named, **result}
        for name in _inside(module, layout.names.state):
            disk = layout.find(name) or layout.find(one.get(name, ""))
            if disk is not None:
                result.setdefault(name, base.tensors[disk])
    return result


def quantized(
    base: BaseModel | None, whole: Collection[str], modules: Collection[str]
) -> list[str]:
    """What is to be told where the base quantizes one of `modules`: PEFT puts a copy of it beside
    the base's own, which has packed numbers and takes no weight."""
    names = [n for n in sorted(whole) if any(f"{n}.".startswith(f"{m}.") for m in modules)]
    found = [] if base is None else [name for name in names if base.is_quantized(name)]
    if not found:
        return []
    return [
        f"trained whole, and quantized in the base: {some(found)}; PEFT does not load it beside "
        "that base, but beside the dequantized one: deploy the merged model (`merge`)"
    ]


def _inside(module: str, named: Mapping[str, _T]) -> dict[str, _T]:
    return {name: each for name, each in named.items() if name.startswith(f"{module}.")}
