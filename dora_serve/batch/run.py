"""A batch at work: what its engine tells goes into `batch.json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from converters.errors import visible

from .job import Engine, Record
from .plan import Batch
from .status import Status, locked, printable


@dataclass(frozen=True)
class Summary:
    """What became of a batch. `skipped` of the runs `done` were done before."""

    done: int
    skipped: int
    failed: Mapping[str, str]
    warnings: Mapping[str, str]
    pending: int
    seconds: float


def run_batch(batch: Batch, engine: Engine, advance: Callable[[int], None]) -> Summary:
    """Convert the runs of `batch`; `advance` is told of each that ends. Ctrl-C leaves the rest
    pending, and the same call goes on with it."""
    began = time.monotonic()
    skipped = 0
    with locked(batch.out):
        status = Status(batch.out)
        for job in batch.jobs:
            if job.done is None:
                status.records[job.name] = Record("pending", str(job.output))
        for name, error in batch.problems.items():
            status.records[name] = Record("failed", str(batch.out / name), error=error)
        status.save()
        left = {job.name for job in batch.jobs}
        try:
            with closing(engine(batch.jobs)) as results:
                for result in results:
                    if result is not None:
                        job, record = result
                        if record is None:
                            skipped += 1
                        else:
                            status.put(job.name, record)
                        left.discard(job.name)
                        advance(1)
                    status.pulse()
        except KeyboardInterrupt:
            pass
        finally:
            status.save()
    ended = {name: status.records[name] for job in batch.jobs if (name := job.name) not in left}
    ended |= {name: status.records[name] for name in batch.problems}
    failed = {n: printable(r.error or "") for n, r in ended.items() if r.state == "failed"}
    warnings = {n: visible("; ".join(r.warnings)) for n, r in ended.items() if r.warnings}
    seconds = round(time.monotonic() - began, 3)
    return Summary(len(ended) - len(failed), skipped, failed, warnings, len(left), seconds)
