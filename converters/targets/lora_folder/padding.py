"""What engines of one rank need beside what a run adapted, see `Profile.uniform`."""

from __future__ import annotations

import re

from ...errors import TargetError
from ...files.tensors import rows_and_columns
from ...model.base import BaseModel
from ...run import Run
from ..engines import Profile

# prefix of the layers, number, path within the layer, kind
_LAYER = re.compile(r"(.*?)\.(\d{1,9})\.(?:(.+)\.)?([^.]+)")


def absent_modules(
    run: Run, base: BaseModel | None, profile: Profile
) -> dict[str, tuple[int, int]]:
    """The modules, `[out, in]`, of the kinds that the run adapted in other layers, and of those
    that `profile` loads only together with them."""
    if not profile.uniform:
        return {}
    if base is None:
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
        transposed = base.is_transposed(module, shape)
        kinds = next((group for group in profile.together if match[4] in group), (match[4],))
        for layer, kind in ((layer, kind) for layer in layers for kind in kinds):
            name = ".".join(filter(None, (match[1], str(layer), match[3], kind)))
            weight = base.weight(name)
            if name not in run.updates and weight is not None:
                rows, columns = rows_and_columns(weight.shape)
                absent[name] = (columns, rows) if transposed else (rows, columns)
    return absent
