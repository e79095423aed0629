"""Runs converted by a Ray cluster, which schedules them and starts anew what a lost node had."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Generator, Sequence

from .errors import ClusterError
from .job import Job, Record

_PATIENCE = 10.0  # seconds for a cluster to answer
_AT_ONCE = 1000  # tasks that Ray knows of; waiting for some takes the longer the more there are


def on_ray(jobs: Sequence[Job], address: str) -> Generator[tuple[Job, Record | None], None, None]:
    """Convert `jobs` on the cluster at `address`, a core for each; yields each job as it ends, with
    what `convert` returned.

    Every node must see runs, bases and outputs by the same paths and have this package installed.
    A run whose process or node dies is tried once more. Raises `ClusterError` when there is no
    such cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from ray.exceptions import RayError
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
            task = ray.remote(num_cpus=1, max_retries=1)(_convert)
            waiting = iter(jobs)
            left: dict[object, Job] = {}
            while True:
                while len(left) < _AT_ONCE and (job := next(waiting, None)) is not None:
                    left[task.remote(job)] = job
                if not left:
                    return
                (ready,), _ = ray.wait(list(left), num_returns=1)
                job = left.pop(ready)
                try:
                    record = ray.get(ready)
                except RayError as error:
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
    return convert(job)


def _lost(job: Job, error: Exception) -> Record:
    said = " ".join(str(error).split())
    return Record(
        "failed",
        str(job.output),
        error=f"its worker or node died twice\n  found: {type(error).__name__}: {said[:500]}",
    )
