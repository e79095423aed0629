"""What many threads may ask at once: a queue in front of a model, and its adapters."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from .adapter_pool import AdapterPool
from .adapter_set import AdaptedFolder
from .limits import Limits, QueueFull


class Engine(ABC):
    """A model that worker threads run; adapters are named by the path of their file.

    `max_length`: tokens of a row.
    """

    max_length: int

    def __init__(self, model: AdaptedFolder, limits: Limits | None, workers: int) -> None:
        self.limits = limits or Limits()
        for name in model.adapters:  # those beside the graph are loaded when they are asked for
            model.remove_adapter(name)
        self.tokenizer = model.tokenizer
        self.pool = AdapterPool(model, self.limits.adapter_bytes)
        self._queue: list[Any] = []
        self._changed = threading.Condition()
        self._closing = False
        kind = type(self).__name__
        self._threads = [
            threading.Thread(target=self._loop, name=kind, daemon=True) for _ in range(workers)
        ]

    def _start(self) -> None:
        for thread in self._threads:
            thread.start()

    @abstractmethod
    def _loop(self) -> None:
        """Serve what is queued; return once it is closing and nothing is left."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Rows in a batch."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def _accept(self, asked: Sequence[Any]) -> None:
        """Queue all of it, or raise `QueueFull`."""
        with self._changed:
            if self._closing or len(self._queue) + len(asked) > self.limits.max_waiting:
                raise QueueFull(
                    "too many requests are waiting",
                    found=len(self._queue),
                    expected=f"at most {self.limits.max_waiting}",
                    remedy="try again later",
                )
            self._queue += asked
            self._changed.notify()

    def close(self) -> None:
        """Finish what was submitted, then end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
