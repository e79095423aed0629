"""From a finished dynamic-rank fine-tune to production.

    >>> from dora_serve import export, merge, read_run, verify, write_adapter, write_onnx
    >>> run = read_run("run/")                      # any supported training run
    >>> merge(run, "out/", base="base/")            # a Hugging Face model folder
    >>> write_adapter(run, "adapter/", base="base/")  # a LoRA adapter, rank per module
    >>> export(run, "any/", "vllm", base="base/")   # any installed target
    >>> write_onnx("base/", "onnx/", adapters={"name": run})  # one graph, many adapters
    >>> verify(run, "out/", base="base/").passed
    True

Nothing heavy is imported until one of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import converters as _converters  # noqa: F401  # keeps libraries silent, see SECURITY.md

if TYPE_CHECKING:
    from converters.errors import DoraExportError
    from converters.options import ReadOptions
    from converters.readers import read_run
    from converters.run import Run

    from .api import diff, export, extract, merge, write_adapter, write_onnx
    from .proof.verify import Verification, verify

__all__ = [
    "DoraExportError",
    "ReadOptions",
    "Run",
    "Verification",
    "diff",
    "export",
    "extract",
    "merge",
    "read_run",
    "verify",
    "write_adapter",
    "write_onnx",
]

_HOMES = {
    "DoraExportError": "converters.errors",
    "ReadOptions": "converters.options",
    "Run": "converters.run",
    "Verification": "dora_serve.proof.verify",
    "diff": "dora_serve.api",
    "export": "dora_serve.api",
    "extract": "dora_serve.api",
    "merge": "dora_serve.api",
    "read_run": "converters.readers",
    "verify": "dora_serve.proof.verify",
    "write_adapter": "dora_serve.api",
    "write_onnx": "dora_serve.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
