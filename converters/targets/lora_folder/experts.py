"""Names in memory, as an adapter needs them, and adapters on fused experts.

Those, `parameter[e]`, are stored in PEFT's form (`target_parameters`): one rank for all experts of
a parameter; those of lower rank are padded with zeros. Adapters on single experts, as transformers
4 names them, become blocks of the parameters that hold the experts in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch

from ...errors import TargetError
from ...model.base import BaseModel
from ...model.layout import REGISTERED, Layout, Place, is_parameter, split_slice
from ...model.match import is_transposed
from ...run import LazyUpdates, Run
from ...updates.rank_one import RankOneSum
from ...updates.update import Update
from ..engines import Profile

_EXPERT = re.compile(r"\.experts\.\d+\.")

Stored = Mapping[str, tuple[int, int, int]]


def padded(stored: Stored) -> dict[str, tuple[int, int, int]]:
    """`stored`, name → (rank, out, in), with the largest rank for every block of a parameter."""
    largest: dict[str, int] = {}
    for name, (rank, _, _) in stored.items():
        stem, index = split_slice(name)
        if index is not None:
            largest[stem] = max(rank, largest.get(stem, 0))
    return {
        name: (largest.get(split_slice(name)[0], rank), out, inn)
        for name, (rank, out, inn) in stored.items()
    }


def in_memory(run: Run, layout: Layout) -> Run:
    """`run` with its adapters on single experts as updates `parameter[e]`. Experts that it has no
    adapter on have an update of rank 0 beside those that it has."""
    placed: dict[str, list[tuple[str, Place]]] = {}
    for module in run.updates:
        if not _EXPERT.search(module) or layout.names.has(module):
            continue
        place = layout.place(module, run.shapes[module])
        if place is not None and len(layout.names.state[place.parameter]) == 3:
            placed.setdefault(place.parameter, []).append((module, place))
    joined = {module for parts in placed.values() for module, _ in parts}
    alone = _alone(run, layout)
    if not joined and not alone:
        return run
    loaders: dict[str, Callable[[], Update]] = {
        module: partial(run.take, module) for module in run.updates if module not in joined
    }
    shapes = {module: run.shapes[module] for module in loaders} | alone
    loaders |= {name: partial(_joined, run, [], shape) for name, shape in alone.items()}
    start_rank = {m: rank for m, rank in run.start_rank.items() if m not in joined}
    for parameter, parts in placed.items():
        experts, rows, columns = layout.names.state[parameter]
        for expert in range(experts):
            name = f"{parameter}[{expert}]"
            mine = [(m, p.start % rows) for m, p in parts if p.start // rows == expert]
            loaders[name] = partial(_joined, run, mine, (rows, columns))
            shapes[name] = rows, columns
            start_rank[name] = sum(run.start_rank.get(module, 0) for module, _ in mine)
    return replace(run, updates=LazyUpdates(loaders, shapes), start_rank=start_rank)


def _alone(run: Run, layout: Layout) -> dict[str, tuple[int, int]]:
    """The blocks, and their shapes, that a parameter has beside those that the run updates."""
    shapes = {split_slice(name)[0]: run.shapes[name] for name in run.updates if "[" in name}
    every = {
        f"{parameter}[{expert}]": shape
        for parameter, shape in shapes.items()
        for expert in range(layout.names.state.get(parameter, (0,))[0])
    }
    return {name: shape for name, shape in every.items() if name not in run.updates}


def _joined(run: Run, parts: list[tuple[str, int]], shape: tuple[int, int]) -> Update:
    """One update `[out, in]` of several that lie below each other: `(module, first row)`."""
    a, c, b = [torch.zeros(0, shape[1])], [torch.zeros(0)], [torch.zeros(shape[0], 0)]
    for module, first in parts:
        update = run.take(module).components()
        if update is None:
            raise TargetError(
                "this module's update is not low-rank, so no LoRA adapter equals it",
                tensor=module,
                remedy="merge it (`merge`), or approximate it with `energy` or `max_rank`",
            )
        rows = torch.zeros(shape[0], update.rank)
        rows[first : first + update.b.shape[0]] = update.b
        a, c, b = [*a, update.a], [*c, update.c], [*b, rows]
    return RankOneSum(torch.cat(a), torch.cat(c), torch.cat(b, dim=1))


def stacked(
    blocks: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`parameter[e]` → (A [r, in], B [out, r]) becomes stored module → (A [E·r, in], B [out, r·E]).

    Of several parameters of one module, the first registered is wrapped innermost (`base_layer`).
    """
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in sorted(blocks, key=lambda name: split_slice(name)[1] or 0):
        parts.setdefault(split_slice(name)[0], []).append(blocks[name])
    result = {}
    for parameter, pairs in parts.items():
        module, _, own = parameter.rpartition(".")
        later = REGISTERED[REGISTERED.index(own) + 1 :] if own in REGISTERED else ()
        outer = sum(f"{module}.{other}" in parts for other in later)
        a = torch.cat([a for a, _ in pairs])
        b = torch.stack([b for _, b in pairs], dim=2).flatten(1)
        result[module + ".base_layer" * outer] = (a, b)
    return result


def parameters(run: Run, layout: Layout | None) -> frozenset[str]:
    """The keys of `run.updates` that are parameters, or blocks of one, and no modules: of fused
    experts also a bias."""
    known = layout.names.state if layout is not None else ()
    return frozenset(name for name in run.updates if is_parameter(name) or name in known)


def no_layers(modules: Iterable[str], layout: Layout | None) -> frozenset[str]:
    """The modules that are no layers PEFT can put a pair beside, as routers of experts since
    transformers 5: it finds their weights as parameters only."""
    model = None if layout is None else layout.names.model
    if model is None:
        return frozenset()
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    known = dict(model.named_modules())
    return frozenset(
        name
        for name in modules
        if (module := known.get(name)) is not None
        and not isinstance(module, (*layers, nn.MultiheadAttention))
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def taken_for_experts(modules: Iterable[str], base: BaseModel | None) -> frozenset[str]:
    """The linear layers that PEFT takes for experts by the last part of their names, in families
    whose experts transformers 5 fused, and that it therefore finds as parameters only."""
    family = "" if base is None else str(base.config.get("model_type"))
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as converted

        if family not in converted and family != "mixtral":  # PEFT takes seconds to be imported
            return frozenset()
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return frozenset()
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(family, "")
    kinds = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
    return frozenset(name for name in modules if name.rpartition(".")[2] in kinds)


def transposed_modules(run: Run, base: BaseModel, layout: Layout, profile: Profile) -> set[str]:
    """The modules stored as [in, out]; raises an error for what is not in the model in memory."""
    fused_matters = "target_parameters" in profile.features
    packed = base.packed  # its files hold other shapes
    result = set()
    for module, shape in run.shapes.items():
        plain = base.weight(module) is not None and not (packed and layout.names.state)
        place = None if plain else layout.place(module, shape)
        stem, block = split_slice(module)
        if place is not None:
            in_memory = place.parameter in (stem, f"{stem}.weight")
            if place.transposed and block is None:
                result.add(module)
        else:
            in_memory = not (fused_matters and _EXPERT.search(module) and layout.is_fused(module))
            if is_transposed(run, base, run.replaced, module, shape):
                result.add(module)
        if not in_memory:
            raise TargetError(
                "the run adapts a module that transformers has under another name, or fused",
                file=run.path,
                tensor=module,
                remedy="merge it (`merge`)",
            )
    return result
