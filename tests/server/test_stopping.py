"""SIGTERM ends a server whatever its clients do; a second signal ends it at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from converters.errors import RunError
from dora_serve.server.connections import END
from dora_serve.server.options import ServerOptions
from dora_serve.server.prepare import child
from dora_serve.server.prepare.child import make_offer
from tests.server.attacks import TEMPLATE, head
from tests.server.conftest import BASE, Server, save_adapter, started
from tests.server.test_faults import gauge

MESSAGES = [{"role": "user", "content": "loops"}]


@pytest.fixture
def alone(place: Path, tmp_path: Path) -> Path:
    """A folder of one model, whose template loops when told so."""
    shutil.copytree(place / "models" / BASE, tmp_path / BASE)
    (tmp_path / BASE / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.fixture
def ending(place: Path, alone: Path) -> Iterator[Server]:
    """A server to end."""
    with started(alone, place, None, ServerOptions(threads=1)) as running:
        yield running


def connected(server: Server, *sent: bytes) -> socket.socket:
    bare = socket.socket()
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bare.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    bare.sendall(b"".join(sent))
    return bare


def body(path: str, content: object) -> bytes:
    sent = json.dumps(content).encode()
    return head(path, f"Content-Length: {len(sent)}") + sent


def test_clients_that_neither_read_nor_send(ending: Server) -> None:
    """An answer that was accepted is finished beside them."""
    large = {"model": BASE, "tokens": [5] * 200_000}
    stream = {"model": BASE, "prompt": "one", "stream": True, "logprobs": 20, "max_tokens": 60,
              "ignore_eos": True, "n": 40}  # fmt: skip
    held = [connected(ending, body("/detokenize", large)) for _ in range(5)]
    held += [connected(ending, body("/v1/completions", stream)) for _ in range(3)]
    held += [connected(ending) for _ in range(5)]  # nothing sent
    held += [connected(ending, b"POST /v1/comp") for _ in range(5)]
    held += [connected(ending, head("/v1/completions", "Content-Length: 100"), b"{")]
    held += [connected(ending, body("/v1/chat/completions", {"model": BASE, "messages": MESSAGES}))]
    time.sleep(3)
    asked = {"model": BASE, "prompt": "one", "n": 100, "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(httpx.post, f"{ending.url}/v1/completions", json=asked, timeout=120)
        time.sleep(0.5)
        ending.process.send_signal(signal.SIGTERM)
        assert ending.process.wait(END + 5) == 0
        assert len(accepted.result().json()["choices"]) == 100
    for bare in held:
        bare.close()
    assert "Traceback" not in ending.log.read_text()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.further)]
)
def test_stopped_while_its_processes_begin(ending: Server, number: signal.Signals) -> None:
    """It serves before they do, and that it ends when it is told to is no failure."""
    ending.process.send_signal(number)
    assert ending.process.wait(END) == 0
    log = ending.log.read_text()
    assert "Application shutdown complete" in log and "Traceback" not in log


@pytest.mark.further
def test_a_terminal_that_is_closed_ends_it_as_softly(ending: Server) -> None:
    asked = {"model": BASE, "prompt": "one", "n": 100, "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(httpx.post, f"{ending.url}/v1/completions", json=asked, timeout=120)
        with ending.http as http:
            while not gauge(http, "vllm:num_requests_running"):
                time.sleep(0.02)
        ending.process.send_signal(signal.SIGHUP)
        assert ending.process.wait(END) == 0
        assert len(accepted.result().json()["choices"]) == 100


def test_a_log_that_nobody_reads_holds_up_nobody(place: Path, alone: Path) -> None:
    """As of a program that starts the server with pipes and never looks into them."""
    reads, writes = os.pipe()
    options = ServerOptions(threads=1)
    with started(alone, place, None, options, errors=writes) as running:
        os.close(writes)
        with running.http as http:
            for _ in range(900):  # lines of 110 bytes, into 64 KiB
                assert http.get("/health", timeout=10).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
    os.close(reads)


def test_a_log_whose_reader_has_ended_is_no_failure(place: Path, alone: Path) -> None:
    reads, writes = os.pipe()
    options = ServerOptions(threads=1)
    with started(alone, place, None, options, errors=writes) as running:
        os.close(writes)
        os.close(reads)
        with running.http as http:
            assert http.get("/health").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.further), signal.SIGINT]
)
def test_a_second_signal_ends_it_at_once(ending: Server, number: signal.Signals) -> None:
    held = [connected(ending, body("/v1/chat/completions", {"model": BASE, "messages": MESSAGES}))]
    time.sleep(1)
    ending.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert ending.process.poll() is None  # what was accepted is waited for
    ending.process.send_signal(number)
    assert ending.process.wait(3) == 128 + number
    held[0].close()


@pytest.mark.further  # the plain run ends it while it prepares
def test_what_is_converted_ends_with_the_server(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a second signal, or where it was killed: nobody else ends what a client had begun."""
    root, cache = tmp_path / "models", tmp_path / "cache"
    monkeypatch.setenv("DORA_SERVE_CACHE", str(cache))
    shutil.copytree(place / "models" / BASE, root / BASE)
    save_adapter(root / ".later")
    options = ServerOptions(threads=1)
    make_offer(root, None, False, options.precision)  # forked; what follows is not
    with started(root, tmp_path, None, options, forked=False) as running:
        known, asked = set(cache.iterdir()), {"lora_name": "later", "lora_path": ".later"}
        held = connected(running, body("/v1/load_lora_adapter", asked))
        below = psutil.Process(running.process.pid)
        while not (
            found := [each for each in _all_below(below) if "prepare.make" in str(each.cmdline())]
        ):
            time.sleep(0.01)
        maps = Path(f"/proc/{found[0].pid}/maps")
        while "libtorch" not in maps.read_text():  # it was asked, and is seconds from its answer
            time.sleep(0.01)
        running.process.kill()
        running.process.wait(10)
        _, left = psutil.wait_procs(found, 10)
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []
    assert set(cache.iterdir()) == known  # it did not go on to its end
    held.close()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(each, marks=pytest.mark.further) for each in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_it_is_ended_while_it_prepares(tmp_path: Path, place: Path, number: signal.Signals) -> None:
    """Neither it goes on, nor what prepares, nor what builds a graph below that."""
    shutil.copytree(place / "models" / BASE, tmp_path / "models" / BASE)
    code = (
        "import sys; from pathlib import Path; from dora_serve.server.up import up;"
        "up(Path(sys.argv[1]), None, '127.0.0.1', 1, None, False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "models")]
    environment = {"PATH": "/usr/bin:/bin", "DORA_SERVE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        # Below nohup it would be ignored here too.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    below = psutil.Process(process.pid)
    while not any("models.builder" in " ".join(each.cmdline()) for each in _all_below(below)):
        assert process.poll() is None
        time.sleep(0.05)
    found = _all_below(below)
    process.send_signal(number)
    assert process.wait(10) in (128 + number, -number)
    _, left = psutil.wait_procs(found, 2)
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("handling", [signal.SIG_DFL, signal.SIG_IGN])
def test_what_prepares_is_ended_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handling: signal.Handlers
) -> None:
    """Where SIGCHLD is ignored, nobody is told how a process ended."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nread request\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(child, "sys", SimpleNamespace(executable=str(python)))
    before = signal.signal(signal.SIGCHLD, handling)
    try:
        with pytest.raises(RunError, match="preparing what is to be served broke off"):
            make_offer(tmp_path, None, True)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _all_below(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [each for each in process.children(recursive=True) if each.cmdline()]
    return []
