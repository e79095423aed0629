"""The exceptions of this project: one root, and children that are also the standard type they are.

Every message names the place, what was found, what was expected and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class DoraExportError(Exception):
    """Root of every error this project raises on purpose.

    What it was given stays as attributes; the text is made of them when it is asked for. In a
    remedy, a word between backticks is a parameter or a verb of the API, which the command line
    shows as its own.
    """

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
        super().__init__(message)
        self.message = message
        self.file = file
        self.tensor = tensor
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        parts = (
            ("file", self.file),
            ("tensor", self.tensor),
            ("found", self.found),
            ("expected", self.expected),
            ("to do", self.remedy),
        )
        lines = [f"  {label}: {visible(value)}" for label, value in parts if value is not None]
        said = [visible(line) for line in self.message.split("\n")]
        return "\n".join([*said, *lines])


def visible(value: object) -> str:
    """The text of a value that others named, with control and bidirectional characters escaped: a
    terminal would obey them. Line breaks stay where the value is an error of several lines."""
    keep = "\n" if isinstance(value, Exception) else ""
    return "".join(
        char if char in keep or char.isprintable() else ascii(char)[1:-1] for char in str(value)
    )


def some(names: Iterable[str], most: int = 6) -> str:
    """The first of `names`, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


@contextmanager
def apart(problems: dict[str, str], *names: str) -> Iterator[None]:
    """What goes wrong within, a bug's error too, is a problem of `names` and of nothing else."""
    try:
        yield
    except DoraExportError as error:
        problems |= dict.fromkeys(names, str(error))
    except Exception as error:
        problems |= dict.fromkeys(names, f"{type(error).__name__}: {str(error)[:300]}")


@contextmanager
def panics() -> Iterator[None]:
    """Within, a panic of a library in Rust, which is no `Exception`, is a `RuntimeError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(str(error)) from error
        raise


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


class ArtifactError(DoraExportError, ValueError):
    """What was written does not load in its engine."""
