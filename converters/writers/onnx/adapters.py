"""`NAME.onnx_adapter`: one run's factors as ONNX Runtime's adapter file.

`onnxruntime.LoraAdapter` and `onnxruntime_genai.Adapters` load it; what it leaves out keeps the
graph's default of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import TensorFileError
from ...run import Run
from .branches import Site, names

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# The sites of an update of that module and shape, each with the update's first row there.
Place = Callable[[str, tuple[int, int]], list[tuple[Site, int]]]

FOLDER, SUFFIX = "adapters", ".onnx_adapter"
_VERSION = 1


def write_adapter_file(path: Path, run: Run, place: Place) -> dict[str, int]:
    """Write the stripped `run`, A `[in, r]` and B `[r, out]` with scale 1; returns the ranks."""
    from onnxruntime import AdapterFormat, OrtValue

    parameters, ranks = {}, {}
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
    file = AdapterFormat()
    file.set_adapter_version(_VERSION)
    file.set_model_version(_VERSION)
    file.set_parameters(parameters)
    file.export_adapter(str(path))
    return ranks


def read_adapter_file(path: Path) -> dict[str, Array]:
    """Input name → array. Raises `TensorFileError` when ONNX Runtime cannot read the file."""
    from onnxruntime import AdapterFormat

    try:
        parameters = AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: value.numpy().copy() for name, value in parameters.items()}
    except Exception as error:
        raise TensorFileError(
            "not an ONNX Runtime adapter",
            file=path,
            found=str(error)[:200],
            remedy="the file is damaged: add the adapter again",
        ) from None
