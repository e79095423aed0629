"""`NAME.onnx_adapter`: one run's factors as ONNX Runtime's adapter file.

`onnxruntime.LoraAdapter` and `onnxruntime_genai.Adapters` load it; what it leaves out keeps the
graph's default of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files.onnx_files import names
from ...run import Run
from .branches import Site

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# The sites of an update of that module and shape, each with the update's first row there.
Place = Callable[[str, tuple[int, int]], list[tuple[Site, int]]]

_VERSION = 1


def write_adapter_file(
    path: Path, run: Run, place: Place, heads: Mapping[str, Array] | None = None
) -> dict[str, int]:
    """Write the stripped `run`, A `[in, r]` and B `[r, out]` with scale 1, and the `heads` that it
    brings, by input name; returns the ranks."""
    from onnxruntime import OrtValue

    parameters = {n: OrtValue.ortvalue_from_numpy(array) for n, array in (heads or {}).items()}
    ranks = {}
    for module in run.updates:
        update = run.updates[module].components()
        assert update is not None
        ranks[module] = update.rank
        sites = place(module, update.shape)
        if not update.rank:
            continue
        a, b = update.balanced()
        for site, row in sites:
            name_a, name_b, _ = names(site.name)
            rows = b[row : row + site.out_features]
            for name, factor in ((name_a, a), (name_b, rows)):
                parameters[name] = OrtValue.ortvalue_from_numpy(factor.T.contiguous().numpy())
    _export(path, parameters)
    return ranks


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
