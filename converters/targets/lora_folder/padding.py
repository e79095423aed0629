"""What engines of one rank need beside what a run adapted, see `Profile.uniform`."""

from __future__ import annotations

import re

from ...errors import TargetError
from ...files.tensors import rows_and_columns
from ...model.base import BaseModel
from ...model.layout import Layout
from ...run import Run
from ..engines import Profile

# prefix of the layers, number, path within the layer, kind
_LAYER = re.compile(r"(.*?)\.(\d{1,9})\.(?:(.+)\.)?([^.]+)")


def absent_modules(
    run: Run, base: BaseModel | None, layout: Layout | None, profile: Profile
) -> dict[str, tuple[int, int]]:
    """The modules, `[out, in]`, of the kinds that the run adapted in other layers, and of those
    that `profile` loads only together with them."""
    if not profile.uniform:
        return {}
    if base is None or layout is None:
        raise TargetError(
            f"an adapter for {profile.name} holds every kind of module in every layer, so its "
            "layers must be known",
            file=run.path,
            remedy="pass the base model with `base`",
        )
    absent: dict[str, tuple[int, int]] = {}
    layers = sorted({int(match[2]) for name in base.tensors if (match := _LAYER.fullmatch(name))})
    seen: set[tuple[str, ...]] = set()
    for module, shape in run.shapes.items():
        match = _LAYER.fullmatch(module)
        if match is None or (match[1], match[3] or "", match[4]) in seen:
            continue
        seen.add((match[1], match[3] or "", match[4]))
        rows_first = _shape(base, layout, module) == shape
        kinds = next((group for group in profile.together if match[4] in group), (match[4],))
        for layer, kind in ((layer, kind) for layer in layers for kind in kinds):
            name = ".".join(filter(None, (match[1], str(layer), match[3], kind)))
            found = _shape(base, layout, name)
            if name not in run.updates and found is not None:
                absent[name] = found if rows_first else found[::-1]
    return absent


def _shape(base: BaseModel, layout: Layout, module: str) -> tuple[int, int] | None:
    """The rows and columns of a weight in memory: on disk a quantized one has others."""
    weight = base.weight(module) if not layout.names.state else None
    shape = layout.names.state.get(f"{module}.weight") if weight is None else weight.shape
    return None if shape is None else rows_and_columns(shape)
