"""Encoder requests in batches of like lengths, whatever their adapters.

>>> queue = EncoderQueue(Encoder("onnx/"))
>>> queue.submit([(ids, types)], adapter)[0].result()["logits"]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .limits import Limits, check_rows, longest_row, takes_much

if TYPE_CHECKING:
    from .encoder import Encoder

    Row = dict[str, Any]

_PAUSE = 0.01  # seconds


@dataclass(eq=False)
class _Job:
    ids: Sequence[int]
    types: Sequence[int]
    adapter: str | None
    finish: Callable[[Row], Any]
    future: Future[Any] = field(default_factory=Future)


class EncoderQueue(Engine):
    """An encoder that many threads may ask at once.

    `workers`: batches that run at once. A batch has at most `limits.max_rows` rows.
    """

    def __init__(self, encoder: Encoder, limits: Limits | None = None, workers: int = 1) -> None:
        super().__init__(encoder, limits, workers)
        self.encoder = encoder
        longest = longest_row(self.limits.row_bytes, encoder.config)
        self.max_length = min(encoder.max_length, longest)
        self._running = 0
        self._start()

    @property
    def running(self) -> int:
        return self._running

    def submit(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        adapter: str | None,
        finish: Callable[[Row], Any] = dict,
    ) -> list[Future[Any]]:
        """What `finish` makes of the outputs by name of every row, which is token ids and their
        types. It runs in a worker, so that a state per token need not be kept.

        Raises `EngineError` for a row that is empty or too long, `QueueFull` when they would be too
        many, and then queues none.
        """
        check_rows([ids for ids, _ in rows], self.max_length, self.encoder.vocabulary)
        jobs = [_Job(ids, types, adapter, finish) for ids, types in rows]
        self._accept(jobs)
        return [job.future for job in jobs]

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                batch = self._take()
                self._running += len(batch)
            self._run(batch)
            with self._changed:
                self._running -= len(batch)

    def _take(self) -> list[_Job]:
        """The job that waits longest, and those whose length is nearest to its own."""
        first = self._queue[0]
        near = sorted(self._queue, key=lambda job: abs(len(job.ids) - len(first.ids)))
        longest = 0
        batch: list[_Job] = []
        for job in near[: self.limits.max_rows]:
            longest = max(longest, len(job.ids))
            if batch and longest > 2 * min(len(other.ids) for other in [*batch, job]) + 8:
                break  # it would be padded to more than twice its length
            if batch and takes_much(len(batch) + 1, longest, self.encoder.config):
                break
            batch.append(job)
        self._queue = [job for job in self._queue if job not in batch]
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
                self._queue = [*later, *self._queue]
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
                try:
                    found = job.finish(row)
                except Exception as error:  # the worker goes on with the others
                    job.future.set_exception(error)
                else:
                    job.future.set_result(found)
