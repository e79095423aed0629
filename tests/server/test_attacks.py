"""Under any attack another client is answered at once, and memory stays what it is when idle."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

import httpx
import pytest

from dora_serve.server.options import ServerOptions
from tests.conftest import MODELS
from tests.server.attacks import ATTACKS, LATER, PATTERN, SLOW, TEMPLATE
from tests.server.conftest import BASE, DOWN, EMBEDS, Server, started
from tests.server.smuggled import MORE

RUN = f"Tiny_Llama/Lora_Rank=8/Count_Down/{DOWN}"
ALL = ATTACKS | MORE
MEMORY = 300 << 20  # bytes
STALLED = 30.0  # seconds after which a server that says nothing is stalled


def used(server: Server) -> int:
    """Bytes of memory of the server and the processes below it; what several share of a library
    counts once."""
    found, left = 0, [server.process.pid]
    while left:
        folder = Path(f"/proc/{left.pop()}")
        with suppress(OSError):
            told = (folder / "smaps_rollup").read_text().split()
            found += int(told[told.index("Pss:") + 1]) << 10
            for children in folder.glob("task/*/children"):
                left += map(int, children.read_text().split())
    return found


@contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """How long another client waited at most for `/health`, and the bytes used at most."""
    worst = [0.0, 0.0]
    done = threading.Event()
    anew = httpx.Limits(max_keepalive_connections=0)  # each question by a connection of its own

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=STALLED, limits=anew) as client:
            while not done.is_set():
                begin = time.monotonic()
                try:
                    fine = client.get("/health").status_code == 200
                except httpx.TimeoutException:
                    fine = False
                worst[0] = max(worst[0], time.monotonic() - begin if fine else inf)
                time.sleep(0.05)

    def weigh() -> None:
        while not done.is_set():
            worst[1] = max(worst[1], used(server))
            time.sleep(0.05)

    threads = [threading.Thread(target=each) for each in (ask, weigh)]
    for each in threads:
        each.start()
    try:
        yield worst
    finally:
        done.set()
        for each in threads:
            each.join()


@pytest.fixture(scope="module")
def attacked(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose decoder came with a template and a tokenizer that mean harm."""
    root = tmp_path_factory.mktemp("attacked")
    for name in (
        BASE,
        EMBEDS,
        "tiny-roberta-base",
        "runs/Checkpoint/Tiny_Roberta",
        "runs/Log/Tiny_Roberta",
    ):
        shutil.copytree(place / "models" / name, root / name)
    later = root / LATER  # which nothing finds
    shutil.copytree(MODELS / "runs/Checkpoint" / RUN, later)
    shutil.copyfile(MODELS / "runs/Log" / RUN / "task_info.json", later / "task_info.json")
    (root / BASE / "chat_template.jinja").write_text(TEMPLATE)
    file = root / BASE / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    parts = [split, tokenizer["pre_tokenizer"]]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    file.write_text(json.dumps(tokenizer))
    options = ServerOptions(threads=1, timeout=60)
    with started(root, place, None, options, forked=False) as running:  # all it has is weighed
        with running.http as http:
            asked = {"model": BASE, "prompt": "count : nine " * 2, "n": 100, "max_tokens": 20}
            for _ in range(2):
                assert http.post("/v1/completions", json=asked).status_code == 200
        yield running


@pytest.fixture(scope="module")
def idle(attacked: Server) -> float:
    """How long `/health` took at most while nobody else asked."""
    with watched(attacked) as worst:
        time.sleep(1)
    return worst[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.further) if n in SLOW else n for n in ALL],
)
def test_attack(attacked: Server, idle: float, name: str) -> None:
    attack, host = ALL[name], attacked.url.removeprefix("http://").split(":")
    send = attack.ready()
    before = used(attacked)
    with watched(attacked) as worst:
        statuses = set(send((host[0], int(host[1]))))
    grown = worst[1] - before
    print(f"\n| {name} | {statuses} | {worst[0]:.2f} s ({idle:.2f}) | {grown / 2**20:+.0f} MB |")
    assert statuses <= attack.fine
    assert grown <= MEMORY
    assert worst[0] < inf
    with attacked.http as http:
        answer = http.post("/v1/completions", json={"model": BASE, "prompt": "count : nine"})
    assert answer.status_code == 200, answer.text
