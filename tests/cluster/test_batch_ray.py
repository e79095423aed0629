"""Many runs on a real Ray cluster of two nodes, of which one is lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from dora_serve.batch.cluster import _one_core
from tests.dora_serve.test_batch import (
    copies,
    delta,
    states,
    status,
    wait_for,
    write_manifest,
)
from tests.dora_serve.test_commands import EXPORT, export

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=small)
    yield made
    made.shutdown()


def at_work(out: Path) -> set[str]:
    """The workers that have converted a run so far."""
    if not (out / "batch.json").exists():
        return set()
    return {record["worker"] for record in status(out).values() if record["worker"]}


def hold_a_run_on(node: Any) -> psutil.Process:
    """Stop the node's worker when it has one, and return it; the other node's does none so long."""
    raylet = node.all_processes["raylet"][0].process.pid
    held: set[psutil.Process] = set()

    def holds() -> bool:
        for worker in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if worker.cmdline()[:1] == ["ray::_convert"] and worker not in held:
                    worker.suspend()
                    held.add(worker)
        return any(worker.ppid() == raylet for worker in held)

    try:
        wait_for(holds)
    finally:
        for worker in held:
            if worker.ppid() != raylet:
                worker.resume()
    return next(worker for worker in held if worker.ppid() == raylet)


def test_a_lost_node_loses_no_run(
    cluster: Any, llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    runs = copies(llama_lora, tmp_path / "runs", 12, only="")
    (runs[4] / "adapter_model.safetensors").write_bytes(b"no tensors")
    manifest = write_manifest(tmp_path / "all.jsonl", runs, llama_base)
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(manifest), str(out), "--ray", cluster.address, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = hold_a_run_on(node)
        wait_for(lambda: at_work(out))
        cluster.remove_node(node, allow_graceful=False)
        worker.kill()  # stopped, it does not see that its node is gone
        summary = json.loads(process.stdout.read())
    assert process.returncode == 1
    found = states(out)
    assert found.keys() == {"done", "failed"}
    assert set(found["failed"]) == set(summary["failed"])
    assert "run-004" in found["failed"]
    assert len(found["done"]) + len(found["failed"]) == 12
    # What died with the node was tried again on the other.
    assert [name for name in found["failed"] if name != "run-004"] == []
    assert all(record["error"] for record in status(out).values() if record["state"] == "failed")
    for run in runs:
        if run.name in found["done"]:
            wanted = delta(run)
            if (out / run.name / "adapter_config.json").exists():
                assert (delta(out / run.name) - wanted).norm() <= 1e-6 * wanted.norm()

    # What is done on Ray is done for everyone.
    again = export("batch", manifest, out, "--workers", "1", "--json")
    assert json.loads(again.stdout)["skipped"] == len(found["done"])


@pytest.mark.further  # the plain run loses a node
def test_a_lost_cluster_leaves_the_rest_pending(
    cluster: Any, llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    runs = copies(llama_lora, tmp_path / "runs", 40, only="")
    manifest = write_manifest(tmp_path / "all.jsonl", runs, llama_base)
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(manifest), str(out), "--ray", cluster.address, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        wait_for(lambda: at_work(out))
        cluster.shutdown()
        said = json.loads(process.stdout.read())
    assert process.returncode == 1
    assert said["error"]["code"] == "ClusterError"
    assert states(out).keys() == {"done", "pending"}


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "127.0.0.1:99999"])
def test_no_cluster_is_an_error(
    address: str, llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [llama_lora], llama_base)
    done = export("batch", manifest, tmp_path / "out", "--ray", address)
    assert done.returncode == 1
    assert "no Ray cluster" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_task_of_ray_has_one_core_of_its_own() -> None:
    """Not beside a cluster, whose tasks have them."""
    before = os.sched_getaffinity(0)
    chosen: list[set[int]] = []
    together = threading.Barrier(len(before), timeout=60)

    def task() -> None:
        with _one_core():
            inside: set[int] = set()

            def started() -> None:
                inside.update(os.sched_getaffinity(0))

            thread = threading.Thread(target=started)  # as a merge starts its own
            thread.start()
            thread.join()
            together.wait()
            chosen.append(inside)
        assert os.sched_getaffinity(0) == before

    tasks = [threading.Thread(target=task) for _ in before]
    for thread in tasks:
        thread.start()
    for thread in tasks:
        thread.join()
    assert sorted(map(sorted, chosen)) == [[core] for core in sorted(before)]
    assert os.sched_getaffinity(0) == before
