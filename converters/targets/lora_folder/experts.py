"""Names in memory, as an adapter needs them, and adapters on fused experts.

Those, `parameter[e]`, are stored in PEFT's form (`target_parameters`): one rank for all experts of
a parameter; those of lower rank are padded with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ...errors import TargetError
from ...model.base import BaseModel
from ...model.layout import FUSED, Layout, is_parameter, split_slice
from ...model.match import is_transposed
from ...run import Run
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


def stacked(
    blocks: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`parameter[e]` → (A [r, in], B [out, r]) becomes stored module → (A [E·r, in], B [out, r·E]).

    Of two parameters of one module, the first registered is wrapped innermost (`base_layer`).
    """
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in sorted(blocks, key=lambda name: split_slice(name)[1] or 0):
        parts.setdefault(split_slice(name)[0], []).append(blocks[name])
    result = {}
    for parameter, pairs in parts.items():
        module, _, own = parameter.rpartition(".")
        outer = [other for other in FUSED if f"{module}.{other}" in parts and other != own]
        inner = own == FUSED[0] and bool(outer)
        a = torch.cat([a for a, _ in pairs])
        b = torch.stack([b for _, b in pairs], dim=2).flatten(1)
        result[f"{module}.base_layer" if inner else module] = (a, b)
    return result


def parameters(run: Run, layout: Layout | None) -> frozenset[str]:
    """The keys of `run.updates` that are parameters, or blocks of one, and no modules: of fused
    experts also a bias."""
    known = layout.names.state if layout is not None else ()
    return frozenset(name for name in run.updates if is_parameter(name) or name in known)


def transposed_modules(run: Run, base: BaseModel, layout: Layout, profile: Profile) -> set[str]:
    """The modules stored as [in, out]; raises an error for what is not in the model in memory."""
    fused_matters = "target_parameters" in profile.features
    packed = "quantization_config" in base.config  # its files hold other shapes
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
