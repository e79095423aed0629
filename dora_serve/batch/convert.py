"""What a worker does: convert one run, whatever comes of it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from converters.certificate import FILE as CERTIFICATE
from converters.certificate import certificate
from converters.errors import DoraExportError, RunError
from converters.files.handles import state_at
from converters.files.json_files import read_json
from converters.model.base import BaseModel, open_base
from converters.readers import ReadOptions, read_run
from converters.run import Run
from converters.targets.merged.companions import companions
from converters.targets.target import target_named
from dora_serve.api import export, find_base
from dora_serve.extras import quiet
from dora_serve.folder.cache import content_key
from dora_serve.proof.check import check

from .job import Job, Record

quiet()  # what the forkserver imports behind this


def convert(job: Job) -> Record | None:
    """Convert the run of `job`; None when its output is there, made from the same.

    An error, a bug's too, is a failed record: it is this run's alone.
    """
    began = time.monotonic()
    key = None
    warnings: tuple[str, ...] = ()
    try:
        before = {path: state_at(path) for path in Path(job.run).rglob("*")}
        run = read_run(job.run, ReadOptions(base=job.base))
        warnings = run.warnings
        name = job.target if job.to == "adapter" else job.to
        base, said = None, dict[str, object]()
        if target_named(name).kind == "model":
            base = find_base(run, job.base)
            said["beside"] = companions(base.path, run, base).hashes()
        elif job.base is not None:
            base = open_base(job.base)
            said["named"] = base.name  # the adapter's configuration has it
        key = content_key(run, base, target=name, **said)
        if key == job.done and _is_made_of(run, base, name, job.output):
            return None
        warnings = export(run, job.output, name, base=base, force=True).warnings
        for path in run.files:
            if path in before and state_at(path) != before[path]:
                raise RunError(
                    "the run changed while it was converted",
                    file=path,
                    remedy="run again when nothing writes to it",
                )
        error = None
    except DoraExportError as problem:
        error = str(problem)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    return Record(
        "done" if error is None else "failed",
        str(job.output),
        key,
        round(time.monotonic() - began, 3),
        error,
        warnings,
        f"{socket.gethostname()}:{os.getpid()}",
    )


def _is_made_of(run: Run, base: BaseModel | None, target: str, folder: Path) -> bool:
    """Whether `folder` is whole, and what `target` is of this run and base, whoever wrote it."""
    try:
        made: Any = read_json(folder / CERTIFICATE)
        own: Any = certificate(target, run, None, {})
        same = (made["target"], made["run"]["files"]) == (target, own["run"]["files"])
        return same and check(folder, base).passed
    except (DoraExportError, OSError, LookupError, TypeError):
        return False
