"""Adapter files that a run would not give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from converters.files.onnx_files import read_adapter_file


def write_overflowing(source: Path, target: Path) -> None:
    """The adapter in `source` with numbers that are finite and whose products are not."""
    _rewrite(source, target, "lora_A", lambda array: np.full_like(array, 3e38))


def scale_adapter(file: Path, factor: float) -> None:
    """Let the adapter do `factor` times what it did."""
    _rewrite(file, file, "lora_B", lambda array: array * np.float32(factor))


def _rewrite(
    source: Path, target: Path, kind: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    parameters = {
        name: change(array) if name.endswith(kind) else array
        for name, array in read_adapter_file(source).items()
    }
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in parameters.items()}
    )
    file.export_adapter(str(target))
