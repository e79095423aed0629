"""Many runs converted by one command: planned, run on an engine, and told in `batch.json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from converters.certificate import FILE as CERTIFICATE
from converters.errors import MissingError
from converters.files.handles import there
from converters.files.output import check_output

from .errors import ClusterError, ManifestError
from .job import Engine, Job, Record
from .manifest import Entry, absolute, check_names, read_manifest
from .status import FILE, Status, locked


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
    folder = source.is_dir()
    entries, problems = _found(source, base) if folder else (read_manifest(source), {})
    known = Status(out).records
    own = [*(entry.name for entry in entries), *problems]
    others = [name for name in known.keys() - set(own) if there(out / name)]
    check_names([*own, *others], source)
    jobs = []
    for entry in entries:
        before = known.get(entry.name)
        done = before.input if before is not None and before.state == "done" else None
        job = Job(
            name=entry.name,
            run=entry.run,
            base=entry.base or (None if base is None else absolute(base)),
            to=entry.to or to,
            target=target,
            output=out / entry.name,
            done=None if force else done,
        )
        jobs.append(job)
    named = {name for job in jobs for name in (job.run, job.base) if name is not None}
    inputs = {Path(name).resolve() for name in named if there(Path(name))}
    if folder:
        inputs.add(source.resolve())
    top = out.resolve()
    near = [path for path in inputs if path.is_relative_to(top) or top.is_relative_to(path)]
    for job in jobs:
        _check_no_link(job)
        check_output(job.output, force or _is_ours(job.output, known.get(job.name)), near)
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
                for ended in results:
                    if ended is not None:
                        job, record = ended
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
    records = {
        name: status.records[name] for name in [*batch.problems, *(j.name for j in batch.jobs)]
    }
    failed = {
        n: _text(r.error or "") for n, r in records.items() if r.state == "failed" and n not in left
    }
    return Summary(
        done=len(records) - len(failed) - len(left),
        skipped=skipped,
        failed=failed,
        pending=len(left),
        seconds=round(time.monotonic() - began, 3),
    )


def _check_no_link(job: Job) -> None:
    for path in (job.output, *job.output.parents[: job.name.count("/")]):
        if path.is_symlink():
            raise ManifestError(
                "an output would be written through a link",
                file=path,
                found=path.readlink(),
                remedy="remove the link",
            )


def _is_ours(output: Path, before: Record | None) -> bool:
    """Whether a batch made `output`, so far as is known: not all that it tried came to be."""
    if before is None:
        return False
    return before.state == "done" or (output / CERTIFICATE).is_file()


def _found(root: Path, base: str | None) -> tuple[list[Entry], Mapping[str, str]]:
    from dora_serve.folder.inventory import discover

    found = discover(root, base)
    if not found.members and not found.problems:
        raise MissingError("no run in this folder", file=root, remedy="give a folder of runs")
    entries = [
        Entry(absolute(str(member.path)), name, absolute(str(member.base.path)))
        for name, member in found.members.items()
    ]
    return entries, {name: _text(problem) for name, problem in found.problems.items()}


def _text(said: str) -> str:
    """What can be printed of `said`: it may name a folder by bytes that are no text."""
    return said.encode(errors="replace").decode()


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
