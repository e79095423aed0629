"""Adapters in memory: loaded when a request needs one, the least used forgotten within a bound."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from pathlib import Path

from converters.errors import MissingError, TensorFileError

from .adapter_set import AdaptedFolder
from .session import EngineError


class AdapterPool:
    """The adapters loaded into `engine`, by their file's path; at most `max_bytes` of files.

    Threads that run the engine `acquire` and `release`, and wait for one another while one loads an
    adapter, which takes seconds for a large one. `expect` and `forget` wait for nobody: the thread
    that asks them answers all clients.
    """

    def __init__(self, engine: AdaptedFolder, max_bytes: int) -> None:
        self._engine, self._max_bytes = engine, max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def __contains__(self, path: str) -> bool:
        return path in self._sizes

    def expect(self, path: str, digest: str) -> None:
        """Load the adapter at `path` only while its parameters have this digest."""
        self._digests[path] = digest

    def acquire(self, path: str | None) -> bool:
        """Load the adapter at `path` unless it is there, and keep it until `release`; False when
        those in use leave no room for it now.

        Raises `DoraExportError` when it cannot be loaded or does not fit the graph.
        """
        with self._lock:
            for each in [*self._unwanted]:  # to which others add meanwhile
                if not self._users[each]:
                    self._drop(each)
            if path is None:
                return True
            if path not in self._sizes:
                try:
                    size = Path(path).stat().st_size
                except OSError:
                    raise MissingError("the adapter's file is gone", file=path) from None
                if size > self._max_bytes:
                    raise EngineError(
                        "the adapter is larger than the memory for adapters",
                        file=path,
                        found=f"{size} bytes",
                        expected=f"at most {self._max_bytes}",
                    )
                if not self._make_room(size):
                    return False
                try:
                    self._engine.add_adapter(path, path)
                except EngineError as error:  # of the file, not of what is asked
                    raise TensorFileError(**vars(error)) from None
                self._check(path)
                self._sizes[path] = size
            self._sizes.move_to_end(path)
            self._users[path] += 1
        return True

    def release(self, path: str | None) -> None:
        """One user less."""
        if path is not None:
            with self._lock:
                self._users[path] -= 1

    def forget(self, path: str) -> None:
        """Have the adapter dropped by the next `acquire` that finds it unused: by a thread that
        runs the engine, since another may ask while a step computes with all that is loaded."""
        self._unwanted.add(path)

    def _check(self, path: str) -> None:
        known = self._digests.get(path)
        if known is not None and self._engine.adapter_set.digest(path).hex() != known:
            self._engine.remove_adapter(path)
            raise TensorFileError(
                "the adapter's file was changed since it was made ready",
                file=path,
                remedy="start the server anew, or load the adapter again",
            )

    def _make_room(self, size: int) -> bool:
        idle = [path for path in self._sizes if not self._users[path]]
        while idle and self.bytes + size > self._max_bytes:
            self._drop(idle.pop(0))
        return self.bytes + size <= self._max_bytes

    def _drop(self, path: str) -> None:
        if path in self._sizes:
            self._engine.remove_adapter(path)
            del self._sizes[path], self._users[path]
        self._unwanted.discard(path)
