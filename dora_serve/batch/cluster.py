"""Runs converted by a Ray cluster, which schedules them and starts anew what a lost node had."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence

from converters.errors import DoraExportError
from converters.files.cores import bind, cores

from .job import PULSE, Job, Record, Results

_PATIENCE = 10.0  # seconds for a cluster to answer
_AT_ONCE = 1000  # tasks that Ray knows of; waiting for some takes the longer the more there are


class ClusterError(DoraExportError, ConnectionError):
    """No Ray cluster could be reached."""


def on_ray(jobs: Sequence[Job], address: str) -> Results:
    """Convert `jobs` on the cluster at `address`, a core for each.

    Every node must see runs, bases and outputs by the same paths and have this package installed.
    A run whose process or node dies is tried once more, after the others. Raises `ClusterError`
    when there is no such cluster, or no more.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from ray.exceptions import LocalRayletDiedError, RayError
    except ImportError:
        raise ClusterError(
            "the package ray is not installed", remedy="pip install 'dora-serve[ray]'"
        ) from None
    _reach(address)
    with contextlib.redirect_stdout(sys.stderr):  # Ray tells of lost nodes there
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _unreached(address, error) from None
        try:
            # Ray itself would try one that runs out of memory again and again.
            task = ray.remote(num_cpus=1, max_retries=0)(_convert)
            waiting, again = deque(jobs), set[str]()
            busy: dict[object, Job] = {}
            while waiting or busy:
                while waiting and len(busy) < _AT_ONCE:
                    job = waiting.popleft()
                    busy[task.remote(job)] = job
                ready, _ = ray.wait(list(busy), num_returns=1, timeout=PULSE)
                if not ready:
                    yield None
                for reference in ready:
                    job = busy.pop(reference)
                    try:
                        record = ray.get(reference)
                    except LocalRayletDiedError:
                        raise ClusterError(
                            "Ray has died on this machine",
                            remedy="start it again; the same command goes on",
                        ) from None
                    except RayError as error:
                        if job.name not in again:
                            again.add(job.name)
                            waiting.append(job)
                            continue
                        record = _lost(job, error)
                    yield job, record
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise `ClusterError` where nobody listens, for which Ray would wait minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreached(address, error) from None


def _unreached(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        "no Ray cluster can be reached",
        found=f"{address}: {error}",
        expected="HOST:PORT, as `ray start --head` prints it",
    )


def _convert(job: Job) -> Record | None:
    import torch

    from .convert import convert

    torch.set_num_threads(1)
    with _one_core():
        return convert(job)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Bind this thread, and those that it starts, to a core that no other of our tasks has.

    A merge has a thread for each core that it may use, and Ray gave it one.
    """
    before = cores()
    with socket.socket(socket.AF_UNIX) as mark:
        core = random.choice(before)
        for free in random.sample(before, len(before)):
            with contextlib.suppress(OSError):  # a name in no folder, gone with this process
                mark.bind(f"\0dora-serve core {free}")
                core = free
                break
        bind([core])
        try:
            yield
        finally:
            bind(before)


def _lost(job: Job, error: Exception) -> Record:
    said = " ".join(str(error).split())
    return Record(
        "failed",
        str(job.output),
        error=f"Ray lost it twice\n  found: {type(error).__name__}: {said[:500]}",
    )
