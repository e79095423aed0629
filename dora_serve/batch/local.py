"""Runs converted by processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess

from converters.errors import OutputError
from converters.files.cores import bind, cores
from converters.files.interpreters import installed_alone

from .job import PULSE, Job, Record, Results

_PATIENCE = 10.0  # seconds for a worker that was told to stop


def on_processes(jobs: Sequence[Job], workers: int) -> Results:
    """Convert `jobs` with at most `workers` processes, each on its share of the cores.

    A run whose process dies is tried once more, after the others.
    """
    workers = min(workers, len(jobs))
    context = multiprocessing.get_context("forkserver")
    # PEFT and transformers take seconds to import: once, not in every worker.
    context.set_forkserver_preload(["dora_serve.batch.convert", "peft"])
    shares = [
        cores()[number::workers] or [cores()[number % len(cores())]] for number in range(workers)
    ]
    waiting, again = deque(jobs), set[str]()
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, Job]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _Worker(context, shares.pop())
                if worker.take(waiting[0]):
                    busy[worker.pipe] = worker, waiting.popleft()
                else:
                    shares.append(worker.stop())
            ready = wait(list(busy), PULSE)
            if not ready:
                yield None
            for pipe in ready:
                assert isinstance(pipe, Connection)
                worker, job = busy.pop(pipe)
                try:
                    record = pipe.recv()
                except (EOFError, OSError):
                    shares.append(worker.stop())
                    if job.name not in again:
                        again.add(job.name)
                        waiting.append(job)
                        continue
                    record = _lost(job, worker.process.exitcode)
                else:
                    idle.append(worker)
                yield job, record
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.process.terminate()
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.stop()


class _Worker:
    def __init__(self, context: ForkServerContext, share: list[int]) -> None:
        self.share = share
        self.pipe, theirs = context.Pipe()
        self.process = _started(context, theirs, share)
        theirs.close()

    def take(self, job: Job) -> bool:
        """Give it a job; False when it is dead."""
        try:
            self.pipe.send(job)
        except OSError:
            return False
        return True

    def stop(self) -> list[int]:
        """Wait for its end; returns its share of the cores."""
        self.pipe.close()
        self.process.join(_PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.share


def _started(context: ForkServerContext, pipe: Connection, share: list[int]) -> ForkServerProcess:
    """A worker's process. The server that forks them is started with the first; it may be killed
    while it is asked, as a worker may be while it converts, and is started once more."""
    for last in (False, True):
        process = context.Process(target=_serve, args=(pipe, share), daemon=True)
        try:
            with installed_alone():
                process.start()
        except (EOFError, OSError) as error:
            if last:
                raise OutputError(
                    "no worker process can be started",
                    found=str(error) or "what starts them was killed",
                    remedy="look whether memory ran out (dmesg), and run again with fewer "
                    "`workers`; where a path is too long, with a shorter TMPDIR",
                ) from None
            time.sleep(PULSE)  # until the system knows that it ended
        else:
            return process
    raise AssertionError


def _serve(pipe: Connection, share: list[int]) -> None:
    """A worker's life: until the other end of the pipe is closed, by whatever cause."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the command ends them
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    bind(share)  # what a merge takes for the number of its threads
    import torch

    from .convert import convert

    torch.set_num_threads(len(share))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(convert(pipe.recv()))


def _outlive_nobody() -> None:
    """End this process with the command: the next would find it writing where it writes itself."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os.kill(os.getpid(), signal.SIGTERM)  # which a write takes as an error, and cleans up


def _lost(job: Job, code: int | None) -> Record:
    how = f"ended with {code}" if code is None or code >= 0 else signal.Signals(-code).name
    error = (
        f"its worker process was killed twice\n  found: {how}\n"
        "  to do: look whether memory ran out (dmesg), and run again with fewer --workers"
    )
    return Record("failed", str(job.output), error=error)
