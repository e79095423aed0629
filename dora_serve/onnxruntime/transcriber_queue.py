"""Models of speech that many threads may ask at once; each sound is heard by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .beams import Search
from .decoder import Completion
from .engine import Engine
from .limits import Limits

if TYPE_CHECKING:
    from .transcriber import Array, Transcriber


@dataclass(eq=False)
class _Job:
    wave: Callable[[], Array]
    adapter: str | None
    language: str | None
    task: str
    search: Search | None
    prompt: Sequence[int]
    future: Future[Completion] = field(default_factory=Future)


class TranscriberQueue(Engine):
    """`max_length`: tokens of an answer and of what it begins with."""

    def __init__(self, model: Transcriber, limits: Limits | None = None) -> None:
        super().__init__(model, limits, workers=1)
        self.model, self.max_length, self._running = model, model.positions, 0
        self._start()

    @property
    def running(self) -> int:
        return self._running

    def submit(
        self,
        wave: Callable[[], Array],
        adapter: str | None,
        language: str | None = None,
        task: str = "transcribe",
        search: Search | None = None,
        prompt: Sequence[int] = (),
    ) -> Future[Completion]:
        """What `Transcriber.transcribe` makes of `wave`, which is called in its turn: what waits
        need not hold its samples, of which a short request may tell many. Raises `QueueFull` when
        too many wait."""
        job = _Job(wave, adapter, language, task, search, prompt)
        self._accept([job])
        return job.future

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                job: _Job = self._queue.pop(0)
                self._running = 1
            if job.future.set_running_or_notify_cancel():
                self._run(job)
            self._running = 0

    def _run(self, job: _Job) -> None:
        try:
            self.pool.acquire(job.adapter)  # nobody else has one
            try:
                (done,) = self.model.transcribe(
                    [job.wave()], job.language, job.task, job.search, job.adapter, job.prompt
                )
            finally:
                self.pool.release(job.adapter)
        except Exception as error:
            job.future.set_exception(error)
        else:
            job.future.set_result(done)
