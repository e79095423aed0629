"""Adapter files that a run would not give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from converters.files.onnx_files import read_adapter_file


def write_overflowing(source: Path, target: Path) -> None:
    """The adapter in `source` with numbers that are finite and whose products are not."""
    parameters = {
        name: np.full_like(array, 3e38) if name.endswith("lora_A") else array
        for name, array in read_adapter_file(source).items()
    }
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in parameters.items()}
    )
    file.export_adapter(str(target))
