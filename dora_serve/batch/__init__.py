"""Many runs converted by one command: planned, run on an engine, and told in `batch.json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import MissingError
from converters.output import check_output

from .errors import ClusterError, ManifestError
from .job import Job, Record
from .manifest import Entry, absolute, check_names, read_manifest
from .status import FILE, Status, locked

Engine = Callable[[Sequence[Job]], Generator[tuple[Job, Record | None], None, None]]


@dataclass(frozen=True)
class Batch:
    """What is to be done. `problems`: what of the folder cannot be read as a run or its base."""

    out: Path
    jobs: Sequence[Job]
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What became of a batch. `skipped` of the runs `done` were done before."""

    done: int
    skipped: int
    failed: Mapping[str, str]
    pending: int
    seconds: float


def plan_batch(
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    to: str = "adapter",
    target: str = "peft",
    force: bool = False,
) -> Batch:
    """What to do for the manifest or folder `source`; writes nothing.

    `base` and `to` hold where an entry says nothing. `force`: convert what is done, and replace
    folders that no batch made. Raises `DoraExportError` when the batch as a whole cannot be done.
    """
    out = out.absolute()
    inputs = [source.absolute()] if source.is_dir() else []
    entries, problems = _found(source, base) if inputs else (read_manifest(source), {})
    check_names([*(entry.name for entry in entries), *problems], source)
    known = Status(out).records
    jobs = []
    for entry in entries:
        before = known.get(entry.name)
        done = before.input if before is not None and before.state == "done" else None
        named = entry.base or (None if base is None else absolute(base))
        job = Job(
            name=entry.name,
            run=entry.run,
            base=named,
            to=entry.to or to,
            target=target,
            output=out / entry.name,
            done=None if force else done,
        )
        if not job.output.resolve().is_relative_to(out.resolve()):
            raise ManifestError(
                "an output would leave the output folder by a link",
                file=job.output,
                found=job.output.resolve(),
                remedy="remove the link",
            )
        own = [Path(path) for path in (job.run, named or "") if Path(path).is_absolute()]
        check_output(job.output, force or before is not None, [*inputs, *own])
        jobs.append(job)
    return Batch(out, jobs, problems)


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
                for job, record in results:
                    left.discard(job.name)
                    if record is None:
                        skipped += 1
                    else:
                        status.put(job.name, record)
                    advance(1)
        except KeyboardInterrupt:
            pass
        finally:
            status.save()
    records = {
        name: status.records[name] for name in [*batch.problems, *(j.name for j in batch.jobs)]
    }
    failed = {n: r.error or "" for n, r in records.items() if r.state == "failed" and n not in left}
    return Summary(
        done=len(records) - len(failed) - len(left),
        skipped=skipped,
        failed=failed,
        pending=len(left),
        seconds=round(time.monotonic() - began, 3),
    )


def _found(root: Path, base: str | None) -> tuple[list[Entry], Mapping[str, str]]:
    from dora_serve.discover import discover

    found = discover(root, base)
    if not found.members and not found.problems:
        raise MissingError("no run in this folder", file=root, remedy="give a folder of runs")
    entries = [
        Entry(absolute(str(member.path)), name, absolute(str(member.base.path)))
        for name, member in found.members.items()
    ]
    return entries, found.problems


__all__ = [
    "FILE",
    "Batch",
    "ClusterError",
    "Engine",
    "Job",
    "ManifestError",
    "Record",
    "Summary",
    "plan_batch",
    "run_batch",
]
