"""`batch.json`: the state of every run of a batch, at any moment whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from converters.certificate import tool
from converters.errors import OutputError
from converters.files.json_files import read_json

from .job import PULSE, Record, State
from .manifest import ManifestError

FILE = "batch.json"
_STATES = get_args(State)


class Status:
    """The records of a batch by name, kept in `OUT/batch.json`."""

    def __init__(self, out: Path) -> None:
        self._path = out / FILE
        self._saved = time.monotonic()
        self._changed = False
        self.records: dict[str, Record] = {}
        if self._path.exists():
            self.records = _records(self._path)

    def put(self, name: str, record: Record) -> None:
        self.records[name] = record
        self._changed = True

    def pulse(self) -> None:
        """Save what is new, once a `PULSE`: ten thousand runs are not written ten thousand times"""
        if self._changed and time.monotonic() - self._saved >= PULSE:
            self.save()

    def save(self) -> None:
        """Write the file in one step. Raises `OutputError` when that fails."""
        runs = {name: asdict(record) for name, record in sorted(self.records.items())}
        text = json.dumps({"tool": tool(), "runs": runs}, indent=2, ensure_ascii=False)
        fresh = self._path.with_name(f".{FILE}")
        try:
            # What an error names may be bytes that are no text.
            fresh.unlink(missing_ok=True)  # which may be a link
            with fresh.open("x", encoding="utf-8", errors="replace") as stream:
                stream.write(text + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(self._path)
        except OSError as error:
            raise OutputError(
                f"the status cannot be written: {error.strerror}",
                file=self._path,
                remedy="look after the disk and run the same command again",
            ) from None
        self._saved = time.monotonic()
        self._changed = False


def printable(said: str) -> str:
    """What can be printed of `said`: it may name a folder by bytes that are no text."""
    return said.encode(errors="replace").decode()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder `out` and keep other batches from it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", file=out) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "another batch is at work here", file=out, remedy="wait for it, or choose another"
            ) from None
        except OSError as error:
            raise OutputError(f"cannot be locked: {error.strerror}", file=out) from None
        yield
    finally:
        os.close(lock)


def _records(path: Path) -> dict[str, Record]:
    try:
        records = {name: Record(**said) for name, said in read_json(path)["runs"].items()}  # type: ignore[attr-defined]
        if all(r.state in _STATES and isinstance(r.input, str | None) for r in records.values()):
            return records
    except (AttributeError, KeyError, TypeError):
        pass
    raise ManifestError(
        "not the status of a batch",
        file=path,
        remedy="choose another output folder, or remove the file to begin anew",
    )
