"""Encoder requests in batches of like lengths, whatever their adapters.

>>> queue = EncoderQueue(Encoder("onnx/"))
>>> queue.submit(ids, types, adapter).result()["logits"]
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .adapter_pool import AdapterPool
from .limits import Limits, QueueFull, check_vocabulary
from .session import EngineError

if TYPE_CHECKING:
    from .encoder import Encoder

    Row = dict[str, Any]

_PAUSE = 0.01  # seconds


@dataclass(eq=False)
class _Job:
    ids: Sequence[int]
    types: Sequence[int]
    adapter: str | None
    future: Future[Row] = field(default_factory=Future)


class EncoderQueue:
    """An encoder that many threads may ask at once; adapters are named by the path of their file.

    `workers`: batches that run at once. A batch has at most `limits.max_rows` rows.
    """

    def __init__(self, encoder: Encoder, limits: Limits | None = None, workers: int = 1) -> None:
        self.encoder, self.limits = encoder, limits or Limits()
        for name in encoder.adapters:  # those beside the graph are loaded when they are asked for
            encoder.remove_adapter(name)
        self.pool = AdapterPool(encoder, self.limits.adapter_bytes)
        self.max_length = encoder.max_length
        self.running = 0
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._loop, name="encoder", daemon=True) for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str | None
    ) -> list[Future[Row]]:
        """The outputs by name of every row, which is token ids and their types.

        Raises `EngineError` for a row that is empty or too long, `QueueFull` when they would be too
        many, and then queues none.
        """
        for ids, _ in rows:
            check_vocabulary(ids, self.encoder.vocabulary)
            if not 0 < len(ids) <= self.max_length:
                raise EngineError(
                    "a text is empty or too long",
                    found=f"{len(ids)} tokens",
                    expected=f"1 to {self.max_length}",
                )
        jobs = [_Job(ids, types, adapter) for ids, types in rows]
        with self._changed:
            if self._closing or len(self._waiting) + len(jobs) > self.limits.max_waiting:
                raise QueueFull(
                    "too many requests are waiting",
                    found=len(self._waiting),
                    expected=f"at most {self.limits.max_waiting}",
                    remedy="try again later",
                )
            self._waiting += jobs
            self._changed.notify()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Finish what was submitted, then end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                batch = self._take()
                self.running += len(batch)
            self._run(batch)
            with self._changed:
                self.running -= len(batch)

    def _take(self) -> list[_Job]:
        """The job that waits longest, and those whose length is nearest to its own."""
        first = self._waiting[0]
        near = sorted(self._waiting, key=lambda job: abs(len(job.ids) - len(first.ids)))
        longest = 0
        batch: list[_Job] = []
        for job in near[: self.limits.max_rows]:
            longest = max(longest, len(job.ids))
            if batch and longest > 2 * min(len(other.ids) for other in [*batch, job]) + 8:
                break  # it would be padded to more than twice its length
            batch.append(job)
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _run(self, batch: list[_Job]) -> None:
        ready: list[_Job] = []
        later: list[_Job] = []
        for job in batch:
            try:
                if not self.pool.acquire(job.adapter):
                    later.append(job)
                elif job.future.set_running_or_notify_cancel():
                    ready.append(job)
                else:
                    self.pool.release(job.adapter)
            except Exception as error:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)
        if later:
            with self._changed:
                self._waiting = [*later, *self._waiting]
        if ready:
            self._answer(ready)
            for job in ready:
                self.pool.release(job.adapter)
        elif later:
            time.sleep(_PAUSE)  # another worker's batch holds the memory

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            outputs = self.encoder.run(
                [job.ids for job in jobs],
                [job.adapter for job in jobs],
                [job.types for job in jobs],
            )
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:  # only the one whose fault it is shall fail
                for job in jobs:
                    self._answer([job])
        else:
            for job, row in zip(jobs, outputs, strict=True):
                job.future.set_result(row)
