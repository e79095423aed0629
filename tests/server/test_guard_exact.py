"""The guard as a server speaks to it: messages in their barest form, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from dora_serve.server import guard
from dora_serve.server.guard import Guard
from dora_serve.server.metrics import Metrics


def passed(messages: list[dict[str, Any]], metrics: Metrics) -> tuple[list[bytes], list[Any]]:
    """The bodies that the application behind the guard was given, and what was answered."""
    bodies: list[bytes] = []
    sent: list[Any] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    guarded = Guard(app, None, 10, False, frozenset(), metrics)
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    asyncio.run(guarded(scope, receive, send))
    return bodies, sent


def test_a_body_in_pieces_the_last_of_which_does_not_say_so() -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "more_body": True},
        {"type": "http.request", "body": b"c"},
    ]
    bodies, sent = passed(messages, Metrics())
    assert bodies == [b"abc"]
    assert messages == []
    assert sent[0]["status"] == 200


def test_websockets_are_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError("it was let through")

    async def receive() -> dict[str, Any]:
        raise AssertionError("it was read")

    guard = Guard(never, None, 10, False, frozenset(), Metrics())
    asyncio.run(guard({"type": "websocket", "path": "/x", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_client_that_leaves_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dora_serve.requests")
    metrics, begin = Metrics(), time.monotonic()
    bodies, _ = passed([{"type": "http.disconnect"}], metrics)
    elapsed = 1e3 * (time.monotonic() - begin)
    assert bodies == []
    (told,) = [json.loads(r.message) for r in caplog.records if r.name == "dora_serve.requests"]
    assert (told["method"], told["path"], told["status"]) == ("POST", None, 499)
    assert 0 <= told["ms"] <= elapsed + 0.1
    assert round(told["ms"], 1) == told["ms"]
    (counted,) = metrics.refused.collect()
    assert {s.labels["status"] for s in counted.samples} == {"499"}


def test_the_time_that_is_logged_is_in_tenths_of_milliseconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([10.0, 11.23456])
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    caplog.set_level(logging.INFO, "dora_serve.requests")
    passed([{"type": "http.request", "body": b""}], Metrics())
    (told,) = [json.loads(r.message) for r in caplog.records if r.name == "dora_serve.requests"]
    assert told["ms"] == 1234.6


def test_bodies_of_many_at_once_are_bounded_together() -> None:
    """One that would be too many is refused, and makes room for the next when it has gone."""
    statuses: list[int] = []
    most = guard._HELD

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if "status" in message:
            statuses.append(message["status"])

    async def ask(guarded: Guard, go: asyncio.Event) -> None:
        pieces = [b"12345", b"67890"]

        async def receive() -> dict[str, Any]:
            piece = pieces.pop(0)
            if not pieces:
                await go.wait()
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        await guarded(
            {"type": "http", "method": "POST", "path": "/x", "headers": []}, receive, send
        )

    async def crowd() -> None:
        guarded = Guard(app, None, 10, False, frozenset(), Metrics())
        go, ready = asyncio.Event(), asyncio.Event()
        ready.set()
        held = [asyncio.ensure_future(ask(guarded, go)) for _ in range(2 * most)]
        await asyncio.sleep(0.05)
        assert statuses == []
        await ask(guarded, ready)
        assert statuses == [503]
        go.set()
        await asyncio.gather(*held)
        assert set(statuses) == {200, 503}
        statuses.clear()
        for _ in range(2 * most):
            await ask(guarded, ready)
        assert statuses == [200] * (2 * most)

    asyncio.run(crowd())


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_not_finished_when_the_server_ends(begun: bool) -> None:
    """The server cancels it: whoever waits for an answer is told why there is none."""
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    async def ending() -> None:
        guarded = Guard(app, None, 10, False, frozenset(), Metrics())
        scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
        asked = asyncio.ensure_future(guarded(scope, receive, send))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asked

    asyncio.run(ending())
    if begun:
        assert [message["type"] for message in sent] == ["http.response.start"]
    else:
        assert sent[0]["status"] == 503
        assert json.loads(sent[1]["body"])["error"]["code"] == "ending"
