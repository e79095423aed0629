"""`NAME.onnx_adapter`: one run's factors as ONNX Runtime's adapter file.

`onnxruntime.LoraAdapter` and `onnxruntime_genai.Adapters` load it; what it leaves out keeps the
graph's default of rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TargetError
from ...files.onnx_files import names
from ...run import Run
from .branches import Site

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_VERSION = 1
# Modules that the graph has in parts: Hugging Face name → the parts, in row order.
_PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def write_adapter_file(
    path: Path, run: Run, sites: Mapping[str, Site], heads: Mapping[str, Array] | None = None
) -> dict[str, int]:
    """Write the stripped `run`, A `[in, r]` and B `[r, out]` with scale 1, for the `sites` of a
    graph, by name, and the `heads` that it brings, by input name; returns the ranks.

    Raises `TargetError` where the graph has no site for an update, or one of another shape.
    """
    from onnxruntime import OrtValue

    parameters = {n: OrtValue.ortvalue_from_numpy(array) for n, array in (heads or {}).items()}
    ranks = {}
    for module in run.updates:
        update = run.updates[module].components()
        assert update is not None
        ranks[module] = update.rank
        own = _sites_of(module, update.shape, sites)
        if not update.rank:
            continue
        a, b = update.balanced()
        for site, row in own:
            name_a, name_b, _ = names(site.name)
            rows = b[row : row + site.out_features]
            for name, factor in ((name_a, a), (name_b, rows)):
                parameters[name] = OrtValue.ortvalue_from_numpy(factor.T.contiguous().numpy())
    _export(path, parameters)
    return ranks


def _sites_of(
    module: str, shape: tuple[int, int], sites: Mapping[str, Site]
) -> list[tuple[Site, int]]:
    """The sites that compute an update of `shape [out, in]`, each with the update's first row
    there."""
    names = [module]
    for packed, parts in _PACKED.items():
        if module not in sites and module.endswith(packed):
            names = [module.removesuffix(packed) + part for part in parts]
    placed, row = [], 0
    for site in (sites[name] for name in names if name in sites):
        placed.append((site, row))
        row += site.out_features
    if not placed or row != shape[0] or any(s.in_features != shape[1] for s, _ in placed):
        raise TargetError(
            "the graph has no place for this module's update",
            tensor=module,
            found=[f"{s.name} [{s.out_features}, {s.in_features}]" for s, _ in placed] or "none",
            expected=list(shape),
            remedy="export it merged: dora-export onnx RUN OUT",
        )
    return placed


def write_own_heads(path: Path, heads: Mapping[str, Array]) -> None:
    """Write the heads of the base itself, by input name, as an adapter file."""
    from onnxruntime import OrtValue

    _export(path, {n: OrtValue.ortvalue_from_numpy(array) for n, array in heads.items()})


def _export(path: Path, parameters: Mapping[str, Any]) -> None:
    from onnxruntime import AdapterFormat

    file = AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(_VERSION)
    file.set_parameters(dict(parameters))
    file.export_adapter(str(path))
