"""Under any attack another client is answered at once, and memory stays what it is when idle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest
from transformers import RobertaForSequenceClassification

from dora_serve.server.options import ServerOptions
from dora_serve.server.prepare.child import make_offer
from tests.conftest import MODELS
from tests.server import meter
from tests.server.attacks import ATTACKS, LATER, PATTERN, SLOW, TEMPLATE
from tests.server.conftest import BASE, DOWN, EMBEDS, Server, save_adapter, started
from tests.server.crossed import CROSS, CROSSED
from tests.server.followed import FOLLOWED
from tests.server.formed import ADAPTER, FORMED
from tests.server.parity_models import save_encoder
from tests.server.smuggled import MORE
from tests.server.test_structure import MODEL, save_bytes_model

RUN = f"Tiny_Llama/Lora_Rank=8/Count_Down/{DOWN}"
ALL = ATTACKS | MORE | FOLLOWED | CROSSED | FORMED
# Rows that take long → what meets the same bound sooner.
LONGER = {
    "a long query that is cut for each": "long documents that are cut",
    "a query that is cut for each": "long documents that are cut",
    "a side that all have": "a query that each document has",
    "a template that powers": "a template that loops",
    "an adapter to convert": "an adapter of PEFT to convert",
    "letters far from the end": "a letter far from the end",
    "many rules": "many words at once",
    "metadata that is none": "unknown names",
    "multiples": "a multiple that takes minutes",
    "objects in lists": "lists in lists",
    "parts of messages": "calls of messages",
    **{f"rules in one another, {n}": "rules in one another, 2680" for n in (700, 1400, 2500, 2620)},
    "the widest beams": "beams of what is told",
    "thoughts": "items of parts",
}
FURTHER = SLOW | LONGER.keys()
assert ALL.keys() >= FURTHER and ALL.keys() - FURTHER >= set(LONGER.values())
MEMORY = 300 << 20  # bytes


@dataclass
class Meter:
    """A process of `meter.py`."""

    process: subprocess.Popen[str]

    @contextmanager
    def watching(self) -> Iterator[list[float]]:
        """How long another client waited at most for `/health`, and the bytes used at most, told
        when this ends."""
        worst: list[float] = []
        assert self._tell() == "ready\n"
        try:
            yield worst
        finally:
            worst += map(float, self._tell().split())

    def _tell(self) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


def test_a_process_that_has_its_parents_memory_counts_once() -> None:
    """Python begins others by vfork, and a slow disk takes its time to run what they are for."""
    code = (  # of CLONE_VM and SIGCHLD: a child that sleeps in its parent's memory
        "import ctypes, os; c = ctypes.CDLL(None); "
        "s = ctypes.create_string_buffer(1 << 20); "
        "held = bytearray(os.urandom(1 << 20) * 50); "
        "c.clone(ctypes.cast(c.pause, ctypes.c_void_p), "
        "ctypes.c_void_p(ctypes.addressof(s) + (1 << 20) - 64), 0x100 | 17, None); "
        "print('ready', flush=True); c.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        (child,) = map(int, children)
        try:
            assert meter.same_memory(child, parent.pid)
            assert not meter.same_memory(parent.pid, os.getpid())
            assert 50 << 20 <= meter.used(parent.pid) < 90 << 20
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()


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
    save_bytes_model(root / MODEL)
    one: Any = {"layers": 1, "num_labels": 1, "type_vocab_size": 1}
    save_encoder(root / CROSS, RobertaForSequenceClassification, **one)
    later = root / LATER  # which nothing finds
    shutil.copytree(MODELS / "runs/Checkpoint" / RUN, later)
    shutil.copyfile(MODELS / "runs/Log" / RUN / "task_info.json", later / "task_info.json")
    save_adapter(root / ADAPTER)
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
    make_offer(root, None, False, options.precision)  # forked, into the cache of all
    with started(root, place, None, options, forked=False) as running:  # all it has is weighed
        with running.http as http:
            asked = {"model": BASE, "prompt": "count : nine " * 2, "n": 100, "max_tokens": 20}
            for _ in range(2):
                assert http.post("/v1/completions", json=asked).status_code == 200
        yield running


@pytest.fixture(scope="module")
def metered(attacked: Server) -> Iterator[Meter]:
    host, port = attacked.url.removeprefix("http://").split(":")
    command = [sys.executable, meter.__file__, host, port, str(attacked.process.pid)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield Meter(process)
        process.communicate()  # the end of its input


@pytest.fixture(scope="module")
def idle(metered: Meter) -> float:
    """How long `/health` took at most while nobody else asked."""
    with metered.watching() as worst:
        time.sleep(1)
    return worst[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.further) if n in FURTHER else n for n in ALL],
)
def test_attack(attacked: Server, metered: Meter, idle: float, name: str) -> None:
    attack, host = ALL[name], attacked.url.removeprefix("http://").split(":")
    send = attack.ready()
    before = meter.used(attacked.process.pid)
    with metered.watching() as worst:
        statuses = set(send((host[0], int(host[1]))))
    grown = worst[1] - before
    print(f"\n| {name} | {statuses} | {worst[0]:.2f} s ({idle:.2f}) | {grown / 2**20:+.0f} MB |")
    assert statuses <= attack.fine
    assert grown <= MEMORY
    assert worst[0] < inf
    with attacked.http as http:
        answer = http.post("/v1/completions", json={"model": BASE, "prompt": "count : nine"})
    assert answer.status_code == 200, answer.text
