"""What passes the guard and what does not, down to the near misses; and what it logs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from dora_serve.server import guard
from dora_serve.server.guard import Guard, is_loopback
from dora_serve.server.metrics import Metrics
from dora_serve.server.wire import errors

BOUND = 100


def make_app(
    api_key: str | None = None, local: bool = False, metrics: Metrics | None = None
) -> FastAPI:
    """An application behind the guard that says how many bytes it was sent."""
    app = FastAPI()

    @app.get("/bug")
    def bug() -> None:
        raise KeyError("a bug")

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def size(request: Request) -> int:
        return len(await request.body())

    errors.install(app)
    app.add_middleware(
        Guard,
        api_key=api_key,
        max_body=BOUND,
        local=local,
        page=frozenset({"/", "/page.js"}),
        metrics=metrics or Metrics(),
    )
    return app


def ask(app: FastAPI, method: str = "GET", path: str = "/x", **more: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, f"http://localhost{path}", **more)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("hosts", "fine"),
    [
        (["localhost"], True),
        (["localhost:8000"], True),
        (["LocalHost:80"], True),
        (["127.0.0.1"], True),
        (["127.0.0.1:65535"], True),
        (["127.1.2.3"], True),
        (["[::1]"], True),
        (["[::1]:8000"], True),
        (["localhost.evil.com"], False),
        (["127.0.0.1.evil.com:80"], False),
        (["evil-localhost"], False),
        (["xlocalhost"], False),
        (["localhostx"], False),
        (["evil.com:localhost"], False),
        (["localhost:80@evil.com"], False),
        (["localhost:80:80"], False),
        (["localhost evil.com"], False),
        (["128.0.0.1"], False),
        (["0.0.0.0"], False),
        (["[::2]"], False),
        (["[::1].evil.com"], False),
        (["[localhost.evil.com]"], False),
        (["[evil.com"], False),
        (["::1"], False),
        ([""], False),
        ([":80"], False),
        (["evil.com", "localhost"], False),
        (["localhost", "evil.com"], False),
        (["localhost", "localhost"], True),
        (["localhost."], False),
        (["localhost:65536"], False),
        (["localhost:+80"], False),
        (["LOCALHOST"], True),
        (["[localhost]"], False),
        (["[127.0.0.1]"], False),
        (["[::1%lo]"], False),
        (["[0:0:0:0:0:0:0:1]"], True),
        (["127.1"], False),
        (["2130706433"], False),
        (["0x7f.0.0.1"], False),
        (["127.0.0.1."], False),
    ],
)
def test_hosts(hosts: Sequence[str], fine: bool) -> None:
    headers = [("Host", host) for host in hosts]
    answer = ask(make_app(local=True), headers=headers)
    assert answer.status_code == (200 if fine else 403)
    assert fine or answer.json()["error"]["code"] == "other_host"
    assert ask(make_app(local=False), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.255.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("126.0.0.1", False),
        ("192.168.0.1", False),
        ("localhost.", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, found: bool) -> None:
    assert is_loopback(host) is found


@pytest.mark.parametrize(
    ("given", "fine"),
    [
        ("Bearer secret", True),
        ("bearer secret", True),
        ("BEARER secret", True),
        ("Bearersecret", False),
        ("Bearer Secret", False),
        ("Bearer secre", False),
        ("Bearer secrets", False),
        ("Bearer  secret", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("secret", False),
        ("Basic secret", False),
        ("Bearer secret, Bearer wrong", False),
        ("", False),
        (None, False),
    ],
)
def test_keys(given: str | None, fine: bool) -> None:
    headers = {} if given is None else {"Authorization": given}
    answer = ask(make_app("secret"), headers=headers)
    assert answer.status_code == (200 if fine else 401)
    if not fine:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(make_app(None), headers=headers).status_code == 200


@pytest.mark.parametrize("key", [None, "secret"])
@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "Same-Origin"}, False),
        ({"Sec-Fetch-Site": ""}, False),
        ({"Origin": "http://localhost"}, True),
        ({"Origin": "https://LOCALHOST"}, True),
        ({"Origin": "http://localhost:3000"}, False),
        ({"Origin": "http://localhost.evil.com"}, False),
        ({"Origin": "https://evil.com"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
        ({"Origin": "https://evil.com", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "https://evil.com", "Sec-Fetch-Site": "none"}, False),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"}, False),
        # Behind a proxy that does not keep the Host.
        ({"Origin": "https://page.example", "Sec-Fetch-Site": "same-origin"}, True),
    ],
)
def test_pages_of_other_sites(headers: dict[str, str], fine: bool, key: str | None) -> None:
    app = make_app(key)
    own = {} if key is None else {"Authorization": f"Bearer {key}"}
    for method in ("GET", "POST"):
        answer = ask(app, method, headers={**headers, **own})
        assert answer.status_code == (200 if fine else 403)
        assert fine or answer.json()["error"]["code"] == "cross_site"
    assert ask(app, path="/page.js", headers=headers).status_code == 200  # a link may lead here


@pytest.mark.parametrize(
    ("method", "path", "size", "fine"),
    [
        ("POST", "/x", 70_000, True),
        ("POST", "/v1/load_lora_adapter", 70_000, False),
        ("POST", "/v1/load_lora_adapter", 60_000, True),
        ("GET", "/x", 70_000, False),
        ("POST", "/health", 1, False),
        ("GET", "/page.js", 1, False),
    ],
)
def test_bodies_where_none_or_a_name_is_expected(
    method: str, path: str, size: int, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.server.test_guard.BOUND", 1 << 20)
    answer = ask(make_app(), method, path, content=b"x" * size)
    assert answer.status_code == (200 if fine else 413)


def test_many_bodies_at_once() -> None:
    """What is held for all clients together is bounded, and free again once it is answered."""
    app = make_app()

    async def send(count: int) -> list[int]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = [client.post("/x", content=in_pieces(BOUND, 50)) for _ in range(count)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert set(asyncio.run(send(guard._HELD))) == {200}
    statuses = asyncio.run(send(3 * guard._HELD))
    assert set(statuses) <= {200, 503}
    assert asyncio.run(send(1)) == [200]


@pytest.mark.parametrize("announced", [True, False])
def test_bodies_of_those_without_a_key_are_not_held(announced: bool) -> None:
    """Else they could keep everybody with a key from asking."""
    app = make_app("secret")
    stays = asyncio.Event()

    async def unfinished() -> AsyncIterator[bytes]:
        yield b"x" * (BOUND - 1)
        await stays.wait()

    async def send() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            length = {"Content-Length": str(BOUND)} if announced else {}
            held = [
                asyncio.create_task(client.post(path, headers=length, content=unfinished()))
                for path in ("/health", "/", "/x") * guard._HELD
            ]
            done, _ = await asyncio.wait(held, timeout=5)
            assert {each.result().status_code for each in done} == {401, 413}
            assert len(done) == len(held)
            own = {"Authorization": "Bearer secret"}
            return (await client.post("/x", headers=own, content=b"x" * BOUND)).status_code

    assert asyncio.run(send()) == 200


def test_a_length_that_is_told_twice() -> None:
    headers = {"Transfer-Encoding": "chunked", "Content-Length": "2"}
    answer = ask(make_app(), "POST", headers=headers, content=b"{}")
    assert answer.status_code == 400
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("path", "fine"),
    [
        ("/health", True),
        ("/ready", True),
        ("/", True),
        ("/page.js", True),
        ("/healthz", False),
        ("/health/", False),
        ("/Health", False),
        ("/x/health", False),
        ("/page.js.map", False),
        ("/metrics", False),
    ],
)
def test_paths_that_need_no_key(path: str, fine: bool) -> None:
    assert ask(make_app("secret"), path=path).status_code == (200 if fine else 401)


def in_pieces(size: int, piece: int) -> AsyncIterator[bytes]:
    """A body whose size no header tells."""

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, size, piece):
            yield b"x" * min(piece, size - begin)

    return pieces()


@pytest.mark.parametrize("piece", [None, 1, 7, BOUND, 10 * BOUND])
@pytest.mark.parametrize(
    ("size", "fine"),
    [(0, True), (BOUND - 1, True), (BOUND, True), (BOUND + 1, False), (3 * BOUND, False)],
)
def test_bodies(size: int, fine: bool, piece: int | None) -> None:
    content: Any = b"x" * size if piece is None else in_pieces(size, piece)
    answer = ask(make_app(), "POST", content=content)
    assert answer.status_code == (200 if fine else 413)
    if fine:
        assert answer.json() == size
    else:
        assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("announced", "read"), [(4 * BOUND, 1), (4 * BOUND + 1, 0), (10**30, 0), (None, 401)]
)
def test_how_much_of_too_large_a_body_is_read(announced: int | None, read: int) -> None:
    """A client that is told no while it sends reads the answer only if what it sent is read; one
    that sends without end is cut off."""
    taken, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x", "more_body": announced is None}

    async def send(message: Any) -> None:
        sent.append(message)

    length = [] if announced is None else [(b"content-length", str(announced).encode())]
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": length, "query_string": b""}
    asyncio.run(make_app()(scope, receive, send))
    assert sent[0]["status"] == 413
    assert taken == read


@pytest.mark.parametrize(("leaves", "status", "code"), [(True, 499, None), (False, 408, "timeout")])
def test_bodies_that_do_not_come(
    leaves: bool, status: int, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.01)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [], "query_string": b""}
    asyncio.run(make_app()(scope, receive, send))
    assert sent[0]["status"] == status
    assert json.loads(sent[1]["body"])["error"]["code"] == code


@pytest.mark.parametrize(("path", "status"), [("/bug", 500), ("/x", 200)])
def test_what_is_logged_and_counted_is_what_the_client_gets(
    path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    caplog.set_level(logging.INFO, "dora_serve.requests")
    assert ask(make_app(metrics=metrics), path=path).status_code == status
    (told,) = [json.loads(r.message) for r in caplog.records if r.name == "dora_serve.requests"]
    pattern = {"/bug": "/bug", "/x": "/{path:path}"}[path]
    assert (told["method"], told["path"], told["status"]) == ("GET", pattern, status)
    (counted,) = metrics.refused.collect()
    counts = {s.labels["status"]: s.value for s in counted.samples if s.name.endswith("_total")}
    assert counts == ({"500": 1.0} if status == 500 else {})
