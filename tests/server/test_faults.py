"""What clients, files and signals do to a server: no wrong answer, nothing lost, nothing leaked."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from dora_serve import read_run, write_onnx
from dora_serve.onnxruntime.limits import Limits
from dora_serve.server.options import ServerOptions
from tests.conftest import MODELS
from tests.engines.adapter_files import scale_adapter
from tests.server.conftest import BASE, DOWN, SECOND, SENTIMENT, Server, started

ASKED = {"model": DOWN, "prompt": "count : nine", "temperature": 0}
ANSWER = " eight seven six five four three"
LONG = {"model": SECOND, "prompt": "count : nine", "ignore_eos": True, "max_tokens": 60}


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def gauge(http: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def wait_idle(http: httpx.Client) -> None:
    for _ in range(200):
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        if not any(gauge(http, name) for name in names):
            return
        time.sleep(0.05)
    raise AssertionError("it never got idle")


def connection(server: Server, body: dict[str, Any]) -> socket.socket:
    """A bare connection that has sent a completion request."""
    content = json.dumps(body).encode()
    key = b"" if server.key is None else f"Authorization: Bearer {server.key}\r\n".encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    bare = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    length = f"Content-Length: {len(content)}\r\n\r\n".encode()
    bare.sendall(head + key + length + content)
    return bare


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.further), True])
def test_clients_that_leave_free_their_rows(narrow: Server, stream: bool) -> None:
    with narrow.http as http:
        wait_idle(http)
        before = gauge(http, "vllm:generation_tokens_total")
        for _ in range(20):
            bare = connection(narrow, {**LONG, "stream": stream, "n": 2})
            if stream:
                assert bare.recv(100).startswith(b"HTTP/1.1 200")
            bare.close()
            time.sleep(0.01)
            wait_idle(http)
        assert gauge(http, "vllm:generation_tokens_total") - before < 0.8 * 20 * 2 * 60
        while (answer := http.post("/v1/completions", json=ASKED)).status_code == 429:
            wait_idle(http)  # a request may come after its client has left
        assert text(answer) == ANSWER


def test_a_slow_reader_holds_up_nobody(narrow: Server) -> None:
    with narrow.http as http:
        slow = connection(narrow, {**LONG, "stream": True, "logprobs": 20})
        begin = time.monotonic()
        for _ in range(5):
            assert text(http.post("/v1/completions", json=ASKED)) == ANSWER
        assert time.monotonic() - begin < 10
        slow.settimeout(20)
        read = b""
        while not read.endswith(b"0\r\n\r\n"):
            time.sleep(0.005)
            read += slow.recv(512)
        assert read.count(b"data: {") >= 60
        assert b"data: [DONE]" in read
        slow.close()


def test_ten_times_more_than_it_can_take(narrow: Server) -> None:
    with narrow.http as http, ThreadPoolExecutor(60) as pool:
        wait_idle(http)
        prompts = {
            "count : nine": ANSWER,
            "count : five": " four three two one zero",
        }
        asked = [prompt for _ in range(30) for prompt in prompts]
        answers = list(
            pool.map(lambda p: http.post("/v1/completions", json={**ASKED, "prompt": p}), asked)
        )
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 6
    for prompt, answer in zip(asked, answers, strict=True):
        if answer.status_code == 200:
            assert text(answer) == prompts[prompt]
        else:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"


def test_bodies_that_are_no_request(narrow: Server) -> None:
    with narrow.http as http:
        for content in (b"", b"{", b"[]", b"\xff", b"null", b"[" * 50_000, b'{"model": NaN}'):
            headers = {"Content-Type": "application/json"}
            answer = http.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 400, content[:20]
            assert answer.json()["error"]["type"] == "invalid_request_error"
        surrogate = b'{"model": "%s", "prompt": "\\ud800"}' % DOWN.encode()
        answer = http.post("/v1/completions", content=surrogate, headers=headers)
        assert answer.status_code == 400
        form = http.post(
            "/v1/completions", content=json.dumps(ASKED), headers={"Content-Type": "text/plain"}
        )
        assert form.status_code == 400  # what a web page could send without asking first


def test_huge_bodies(narrow: Server) -> None:
    with narrow.http as http:
        before = narrow.rss()
        for size in (100 << 10, 64 << 20):
            huge = {**ASKED, "prompt": "x" * size}
            try:
                assert http.post("/v1/completions", json=huge).status_code == 413
            except httpx.TransportError:
                assert size > 1 << 20  # cut off while it was sending

        def endless() -> Any:
            for _ in range(1000):
                yield b"x" * 65536

        with suppress(httpx.TransportError):
            assert http.post("/v1/completions", content=endless()).status_code == 413
        assert narrow.rss() - before < 16 << 20
        assert text(http.post("/v1/completions", json=ASKED)) == ANSWER


def test_the_key(narrow: Server) -> None:
    bare = httpx.Client(base_url=narrow.url)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        answer = bare.post("/v1/completions", json=ASKED, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert bare.get("/metrics").status_code == 401
    assert bare.get("/health").status_code == bare.get("/ready").status_code == 200


def test_names_that_lead_here_from_elsewhere(server: Server) -> None:
    for host, status in (("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:8000", 200)):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.com"}).status_code == 403
    answer = httpx.get(f"{server.url}/health", headers={"Origin": "https://evil.com"})
    assert "access-control-allow-origin" not in answer.headers


def test_adapter_of_another_base(server: Server) -> None:
    path = next(server.root.glob(f"runs/Checkpoint/Tiny_Roberta/*/*/{SENTIMENT}"))
    lost = server.root / "lost"
    shutil.copytree(path, lost / "checkpoint" / "x", dirs_exist_ok=True)
    with server.http as http:
        for given in (BASE, "lost", "runs"):
            body = {"lora_name": "other", "lora_path": given}
            answer = http.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == 400, answer.text
        assert http.post("/v1/completions", json={**ASKED, "model": "other"}).status_code == 404
    shutil.rmtree(lost)


def test_adapter_files_that_are_lost_cut_or_changed(tmp_path: Path) -> None:
    """Loaded adapters answer as before; one that has to be loaded fails alone, and says why."""
    root = tmp_path / "models"
    runs = {
        n: read_run(next(MODELS.glob(f"runs/*/*/*/*/{n}/checkpoint")).parent)
        for n in (DOWN, SECOND)
    }
    names = ("second", "third", "fourth", "fifth")
    adapters = {"down": runs[DOWN], **dict.fromkeys(names, runs[SECOND])}
    write_onnx(MODELS / BASE, root / "many", adapters=adapters)
    files = root / "many" / "adapters"
    with started(root, tmp_path) as other, other.http as http:
        body = {**ASKED, "model": "down"}
        assert text(http.post("/v1/completions", json=body)) == ANSWER
        (files / "down.onnx_adapter").unlink()
        cut = files / "second.onnx_adapter"
        cut.write_bytes(cut.read_bytes()[:1000])
        scale_adapter(files / "fourth.onnx_adapter", 2)
        scale_adapter(files / "fifth.onnx_adapter", float("nan"))
        assert text(http.post("/v1/completions", json=body)) == ANSWER
        wrong = {"second": "not an ONNX Runtime adapter", "fourth": "was changed"}
        for name, said in {**wrong, "fifth": "not finite"}.items():
            for stream in (False, True):
                asked = {**body, "model": name, "stream": stream}
                answer = http.post("/v1/completions", json=asked)
                assert answer.status_code == 503
                assert said in answer.json()["error"]["message"]
        assert text(http.post("/v1/completions", json=body)) == ANSWER
        third = text(http.post("/v1/completions", json={**body, "model": "third"}))
        assert third.startswith(" eleven thirteen")


@pytest.mark.usefixtures("server")  # what it converted is in the cache
def test_sigterm_under_load_finishes_what_was_accepted(place: Path) -> None:
    options = ServerOptions(threads=1, limits=Limits(max_rows=2, max_waiting=100))
    with started(place / "models", place, None, options) as other:
        pool = ThreadPoolExecutor(40)
        asked: list[Future[httpx.Response]] = []
        body = {**LONG, "model": DOWN, "temperature": 0, "n": 2}
        with other.http as http:
            expected = text(http.post("/v1/completions", json=body))
            for _ in range(40):
                asked.append(
                    pool.submit(httpx.post, f"{other.url}/v1/completions", json=body, timeout=60)
                )
            while gauge(http, "vllm:num_requests_waiting") < 60:
                time.sleep(0.005)
            other.process.send_signal(signal.SIGTERM)
        answered = 0
        for each in asked:
            try:
                assert text(each.result()) == expected
                answered += 1
            except httpx.TransportError:
                continue  # it came too late to be accepted
        assert answered >= 30
        assert other.process.wait(30) == 0
        log = other.log.read_text()
        assert log.count('"status": 200') >= answered
        assert "Traceback" not in log


def test_the_log_tells_no_text(server: Server) -> None:
    with server.http as http:
        secret = "swordfish"
        http.post("/v1/completions", json={**ASKED, "prompt": secret})
        http.post("/v1/completions", json={**ASKED, "prompt": secret, "max_tokens": 1000})
        http.post("/v1/completions", json={**ASKED, "prompt": {"x": secret}})
        http.post("/classify", json={"model": SENTIMENT, "input": secret})
        http.get(f"/v1/models/{secret}?x={secret}")
    lines = server.log.read_text().splitlines()
    assert secret not in "\n".join(lines)
    told = json.loads(next(line for line in lines if '"completion_tokens"' in line))
    assert {"time", "method", "path", "status", "ms", "model", "prompt_tokens"} <= set(told)


def test_memory_is_flat(server: Server) -> None:
    bodies = [
        {**ASKED, "model": model, "prompt": prompt, "stream": stream, "logprobs": 2}
        for model in (BASE, DOWN, SECOND)
        for prompt in ("count : nine", "cat " * 30)
        for stream in (False, True)
    ]
    with server.http as http, ThreadPoolExecutor(8) as pool:

        def ask(body: dict[str, Any]) -> None:
            assert http.post("/v1/completions", json=body).status_code == 200

        list(pool.map(ask, bodies * 20))
        before = server.rss()
        list(pool.map(ask, bodies * 40))
        assert server.rss() - before < 8 << 20


def test_what_a_request_asks_in_vain_is_no_fault_of_the_server(narrow: Server) -> None:
    """Its client is told, and the log has its line alone."""
    with narrow.http as http:
        body = {**ASKED, "allowed_token_ids": [2], "min_tokens": 2}
        refused = http.post("/v1/completions", json=body)
    assert refused.status_code == 400 and "no token is left" in refused.text
    assert "Traceback" not in narrow.log.read_text()


def test_what_is_no_request_behind_a_refusal_is_cut_off(narrow: Server) -> None:
    """A body that breaks once its request was refused: nothing may be said of it any more."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(narrow.url.rpartition(":")[2]))) as bare:
        bare.settimeout(20)
        bare.sendall(head)
        said = bare.recv(1 << 16)
        assert said.startswith(b"HTTP/1.1 401")
        bare.sendall(b"no length\r\n")
        while piece := bare.recv(1 << 16):
            said += piece
    assert said.count(b"HTTP/1.1") == 1
    assert "Traceback" not in narrow.log.read_text()


def test_of_too_many_connections_those_that_ask_stay(narrow: Server) -> None:
    """However long they have been there."""
    address, pid = ("127.0.0.1", int(narrow.url.rpartition(":")[2])), narrow.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (160, before[1]))  # 80 connections
    silent: list[socket.socket] = []
    try:
        with socket.create_connection(address, timeout=20) as asking:
            for _ in range(10):
                asking.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    piece = asking.recv(1 << 16)
                    assert piece, "it was cut off"
                    answer += piece
                assert answer.startswith(b"HTTP/1.1 200")
                silent += [socket.create_connection(address, timeout=20) for _ in range(20)]
    finally:
        for each in silent:
            each.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
