"""The exceptions of this project: one root, and children that are also the standard type they are.

Every message names the place, what was found, what was expected and what to do next.
"""

from __future__ import annotations

from pathlib import Path


class DoraExportError(Exception):
    """Root of every error this project raises on purpose."""

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        tensor: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        parts = (
            ("file", file),
            ("tensor", tensor),
            ("found", found),
            ("expected", expected),
            ("to do", remedy),
        )
        lines = [message, *(f"  {label}: {value}" for label, value in parts if value is not None)]
        super().__init__("\n".join(lines))


class RunError(DoraExportError, ValueError):
    """The run (or adapter) cannot be read as what it claims to be."""


class BaseError(DoraExportError, ValueError):
    """The base model is broken, incomplete, or not the one the run was trained on."""


class TensorFileError(DoraExportError, ValueError):
    """A tensor file is truncated, inconsistent, or holds more than tensors."""


class MissingError(DoraExportError, FileNotFoundError):
    """A file or folder that is needed does not exist."""


class OutputError(DoraExportError, OSError):
    """The output folder cannot be written."""


class TargetError(DoraExportError, ValueError):
    """The deployment target cannot carry what the run trained."""
