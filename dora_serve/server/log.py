"""The server's log, written beside the event loop."""

from __future__ import annotations

import logging
import os
import threading
from queue import Full, Queue

_WAITING = 10_000  # lines
_LAST = 1.0  # seconds, in which what is left at the end is written


class Beside(logging.Handler):
    """Writes to the file `number` from a thread of its own. A pipe that nobody reads takes no more
    once it is full, as of a program that started the server and does not look at what it says: who
    writes waits then, and that may not be whoever answers. Of lines beyond those that may wait, how
    many were lost is told when there is room again. Nor does a file that takes nothing more, such
    as one whose reader has ended, keep the server from going on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number, self._lost = number, 0
        self._lines: Queue[str | None] = Queue(_WAITING)
        # Nothing waits for it at the end: a write may never come back.
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except Full:
            self._lost += 1

    def close(self) -> None:
        try:
            self._lines.put_nowait(None)
            self._thread.join(_LAST)
        except Full:
            pass
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            self._put(line)
            if self._lost:
                lost, self._lost = self._lost, 0
                self._put(f"{lost} lines of the log were lost: nobody read them")

    def _put(self, line: str) -> None:
        left = f"{line}\n".encode(errors="backslashreplace")
        try:
            while left:
                left = left[os.write(self._number, left) :]
        except OSError:  # nobody reads it, or its disk is full: the next line may have room again
            return
