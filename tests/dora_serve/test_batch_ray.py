"""Many runs on a real Ray cluster of two nodes, of which one is lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed")


@pytest.fixture
def cluster() -> Iterator[Any]:
    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=small)
    yield made
    made.shutdown()


def at_work(out: Path) -> set[str]:
    """The workers that have converted a run so far."""
    if not (out / "batch.json").exists():
        return set()
    return {record["worker"] for record in status(out).values() if record["worker"]}


def test_a_lost_node_loses_no_run(
    cluster: Any, llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    runs = copies(llama_lora, tmp_path / "runs", 60, only="")
    (runs[4] / "adapter_model.safetensors").write_bytes(b"no tensors")
    manifest = write_manifest(tmp_path / "all.jsonl", runs, llama_base)
    out = tmp_path / "out"
    command = [str(EXPORT), "batch", str(manifest), str(out), "--ray", cluster.address, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        wait_for(lambda: len(at_work(out)) == 2)  # one on each node
        cluster.remove_node(node, allow_graceful=False)
        summary = json.loads(process.stdout.read())
    assert process.returncode == 1
    found = states(out)
    assert found.keys() == {"done", "failed"}
    assert set(found["failed"]) == set(summary["failed"])
    assert "run-004" in found["failed"]
    assert len(found["done"]) + len(found["failed"]) == 60
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


def test_a_lost_cluster_leaves_the_rest_pending(
    cluster: Any, llama_lora: Path, llama_base: Path, tmp_path: Path
) -> None:
    runs = copies(llama_lora, tmp_path / "runs", 100, only="")
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
