"""Servers that are made equal to one folder at once: one that hangs keeps no other waiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event, Thread

import click

from converters.errors import OutputError, visible

from .desired import Desired
from .watch import Server, reconcile


class Told:
    """Tells what is wrong, once as long as it lasts."""

    def __init__(self) -> None:
        self._lines: set[str] = set()

    def tell(self, lines: Iterable[str]) -> None:
        lines = list(lines)
        for line in lines:
            if line not in self._lines:
                click.secho(visible(line), fg="yellow", err=True)
        self._lines = set(lines)


class Replica:
    """A server that is made equal beside others, and tells what was done. `failed`: whether
    something did at its last look."""

    def __init__(self, server: Server, ours: Path, *, keep: bool) -> None:
        self._server, self._ours, self._keep = server, ours, keep
        self._told, self._idle = Told(), Event()
        self._idle.set()
        self.failed = False

    def follow(self, wanted: Desired) -> None:
        """Begin to make it equal, if it is not still at it."""
        if self._idle.is_set():
            self._idle.clear()
            # Of no pool: Ctrl-C would wait for the answer of a server that hangs.
            Thread(target=self._equal, args=(wanted,), daemon=True).start()

    def wait(self, seconds: float | None) -> None:
        """Until it is done, or for so long."""
        self._idle.wait(seconds)

    def _equal(self, wanted: Desired) -> None:
        self.failed = True  # also where this ends by an error that nobody thought of
        try:
            wrong = list(self._wrong(wanted))
            self._told.tell(wrong)
            self.failed = bool(wrong)
        finally:
            self._idle.set()

    def _wrong(self, wanted: Desired) -> Iterator[str]:
        try:
            for change in reconcile(self._server, wanted, self._ours, keep=self._keep):
                line = f"{change.server} {change.done} {change.name} {change.error}".strip()
                if change.done == "failed":
                    yield line
                else:
                    click.echo(visible(line))
        except OutputError as error:
            yield str(error)
        except OSError as error:
            yield f"{self._server.url} does not answer: {error}"
