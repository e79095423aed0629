"""The embedded engine on a Ray cluster of two nodes, deployed as `deploy --to ray` says: it answers
as one server does, and a node that dies takes no request with it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner

from dora_serve.commands import dora_serve
from tests.conftest import MODELS
from tests.ports import free_port
from tests.server.conftest import BASE, DOWN, SECOND, Server, started

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

PROMPTS = ("count : nine", "copy : cat moon river =", "count : twenty-one", "cat")
PATIENCE = 300  # seconds after which nothing more is waited for
ASKED = [(model, prompt) for model in (BASE, DOWN, SECOND) for prompt in PROMPTS]


@dataclass
class Nodes:
    """The cluster. `url`: of both nodes' proxies, for they are on one machine and share a port."""

    cluster: Any
    worker: Any
    url: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `models` are the sample decoder with its runs."""
    found = tmp_path_factory.mktemp("ray")
    for part in (BASE, "runs/Checkpoint/Tiny_Llama", "runs/Log/Tiny_Llama"):
        shutil.copytree(MODELS / part, found / "models" / part)
    return found


@pytest.fixture(scope="module")
def single(folder: Path) -> Iterator[Server]:
    """One server of the same."""
    with started(folder / "models", folder) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(folder: Path, single: Server) -> Iterator[Nodes]:
    pytest.importorskip("ray.serve", reason="Ray is not installed with what Ray Serve needs")
    import ray
    from ray.cluster_utils import Cluster

    assert single.process.poll() is None  # what it converted is in the cache
    port, dashboard = free_port(), free_port()
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "DORA_SERVE_CACHE": os.environ.get("DORA_SERVE_CACHE", str(folder / "cache")),
    }
    config = folder / "serve.yaml"
    words = ["--to", "ray", "--engine", "onnxruntime", "--min-replicas", "2", "--threads", "1"]
    done = CliRunner().invoke(dora_serve, ["deploy", str(folder / "models"), *words])
    assert done.exit_code == 0, done.output
    asked = yaml.safe_load(done.stdout)
    asked["http_options"] = {"host": "127.0.0.1", "port": port}
    asked["applications"][0]["deployments"][0]["max_replicas_per_node"] = 1
    config.write_text(yaml.safe_dump(asked))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster()
        try:
            store = {"num_cpus": 2, "object_store_memory": 100 << 20}
            cluster.add_node(**store, include_dashboard=True, dashboard_port=dashboard)
            worker = cluster.add_node(**store)
            program = Path(sys.executable).parent / "serve"
            address = f"http://127.0.0.1:{dashboard}"
            subprocess.run([program, "deploy", "--address", address, config], check=True)
            running = Nodes(cluster, worker, f"http://127.0.0.1:{port}")
            _wait(running)
            yield running
        finally:
            ray.shutdown()
            cluster.shutdown()


def _wait(nodes: Nodes) -> None:
    """Until there is a replica on each node, and proxies that know them."""
    import ray
    from ray import serve

    ray.init(address=nodes.cluster.address, log_to_driver=False)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        status = serve.status()
        healthy = [proxy == "HEALTHY" for proxy in status.proxies.values()]
        if replicas() == 2 and healthy == [True, True]:
            return
        time.sleep(0.2)
    raise AssertionError(str(serve.status()))


def replicas() -> int:
    """How many run."""
    from ray import serve

    application = serve.status().applications.get("dora-serve")
    if application is None or not application.deployments:
        return 0
    states = application.deployments["Embedded"].replica_states
    return int(states.get("RUNNING", 0))


def complete(url: str, model: str, prompt: str) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def expected(single: Server) -> dict[tuple[str, str], Any]:
    """What one server says."""
    told = {pair: choices(complete(single.url, *pair)) for pair in ASKED}
    assert len({told[model, PROMPTS[0]][0][0]["text"] for model in (BASE, DOWN, SECOND)}) == 3
    return told


def choices(answer: httpx.Response) -> Any:
    """The answer without its name and time."""
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return told["choices"], told["usage"]


def test_it_answers_as_one_server_does(
    nodes: Nodes, single: Server, expected: dict[tuple[str, str], Any]
) -> None:
    for pair in ASKED * 2:
        assert choices(complete(nodes.url, *pair)) == expected[pair]
    both = [httpx.get(f"{url}/v1/models") for url in (nodes.url, single.url)]
    names = [{model["id"] for model in answer.json()["data"]} for answer in both]
    assert names[0] == names[1]
    streamed = {"model": DOWN, "prompt": "count : nine", "stream": True}
    stream = httpx.post(f"{nodes.url}/v1/completions", json=streamed)
    assert stream.text.count("data: ") > 3
    assert stream.text.rstrip().endswith("data: [DONE]")
    unknown = httpx.post(f"{nodes.url}/v1/completions", json={"model": "none", "prompt": "x"})
    assert unknown.json()["error"]["code"] == "model_not_found"
    body = {"lora_name": "more", "lora_path": "runs"}  # it would be there on one replica
    refused = httpx.post(f"{nodes.url}/v1/load_lora_adapter", json=body)
    assert refused.json()["error"]["code"] == "not_served"


def test_a_node_that_dies_takes_no_request_with_it(
    nodes: Nodes, expected: dict[tuple[str, str], Any]
) -> None:
    import ray

    assert replicas() == 2
    stop = threading.Event()
    told = threading.Condition()
    failed: list[str] = []
    done = [0] * 6

    def client(number: int) -> None:
        """Ask one after the other, each until it is answered."""
        for pair in itertools.cycle(ASKED):
            if stop.is_set():
                return
            answer = _persist(nodes.url, pair, failed)
            assert choices(answer) == expected[pair]
            done[number] += 1
            wake()

    def wake() -> None:
        with told:
            told.notify()

    def until(count: int) -> None:
        """Every client has got `count` more answers, or one has ended, which none should."""
        goal = [number + count for number in done]

        def reached() -> bool:
            ended = any(future.done() for future in clients)
            return ended or all(have >= want for have, want in zip(done, goal, strict=True))

        with told:
            assert told.wait_for(reached, PATIENCE), done
        assert not any(future.done() for future in clients), [f.result() for f in clients]

    with ThreadPoolExecutor(len(done)) as pool:
        clients = [pool.submit(client, number) for number in range(len(done))]
        for future in clients:
            future.add_done_callback(lambda _ended: wake())
        try:
            until(3)
            nodes.cluster.remove_node(nodes.worker, allow_graceful=False)
            until(12)
        finally:
            stop.set()
    for future in clients:
        future.result()
    end = time.monotonic() + PATIENCE
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # the control
        assert time.monotonic() < end
        time.sleep(0.2)
    print(f"{sum(done)} requests answered, {len(failed)} tries failed: {set(failed)}")


def _persist(url: str, pair: tuple[str, str], failed: list[str]) -> httpx.Response:
    """The answer, after however many tries; those that brought none are added to `failed`."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            answer = complete(url, *pair)
            if answer.status_code < 500:
                return answer
            failed.append(str(answer.status_code))
        except httpx.TransportError as error:
            failed.append(type(error).__name__)
        time.sleep(0.05)
    raise AssertionError(failed)
