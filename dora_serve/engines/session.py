"""ONNX Runtime sessions on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import MissingError

from .onnxruntime import EngineError


def open_graph(path: Path, threads: int | None = None) -> Any:
    """A session of the graph at `path`; `threads` None is one per core.

    Raises `MissingError` when there is no graph, `EngineError` when it cannot be loaded.
    """
    import onnxruntime

    if not path.exists():
        raise MissingError("no ONNX graph here", file=path, remedy="make it: dora-export onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(
            "ONNX Runtime cannot load this graph",
            file=path,
            found=str(error)[:300],
            remedy="export it again",
        ) from None
