"""What every request passes before a route sees it: the key, the body's bound, the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .state import NOTES
from .wire.errors import ApiError

_log = logging.getLogger("dora_serve.requests")
_OPEN = {"/health", "/ready"}
_HOST = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<name>[^:\[\]]+))(?::\d*)?")
_DRAIN = 4  # bodies' bounds that are read and dropped, so that a client gets to read the refusal
_BODY_SECONDS = 60


class Guard:
    """Refuses with 401 what lacks `api_key` (None: nothing does), with 413 what is larger than
    `max_body`, and writes a line of JSON per request, without any of its text. `local`: refuse
    with 403 what names this server otherwise than a client on this machine would. `page`: paths
    that are served without a key."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body: int,
        local: bool,
        page: frozenset[str],
        metrics: Metrics,
    ) -> None:
        self._app, self._max_body, self._local = app, max_body, local
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._open = _OPEN | page
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        notes: dict[str, Any] = {"method": scope["method"], "path": None, "status": 499}
        scope[NOTES] = notes

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes["status"] = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watch)
        except ApiError as error:
            await error.response()(scope, receive, watch)
        except Exception:
            notes["status"] = 500  # what Starlette answers, outside of this
            raise
        finally:
            route = scope.get("route")  # its pattern: a path may hold what nobody should read
            notes["path"] = getattr(route, "path", None)
            if notes["status"] >= 400:
                self._metrics.refused.labels(notes["status"]).inc()
            notes["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
            notes["ms"] = round(1e3 * (time.monotonic() - begin), 1)
            _log.info(json.dumps(notes))

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if self._local and not all(map(_is_here, hosts)):
            # A page from elsewhere may let its own name lead here, and then read the answers.
            raise ApiError("This server answers to localhost alone.", 403, code="other_host")
        if self._key is not None and scope["path"] not in self._open:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                raise ApiError("This server needs an API key.", 401, code="invalid_api_key")
        body = await self._body(headers, receive)
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        announced = int(length) if length.isdigit() else 0
        body, read = bytearray(), 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while max(announced, read) <= _DRAIN * self._max_body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("the client left", 499)
                    piece = message.get("body", b"")
                    read += len(piece)
                    if read <= self._max_body:
                        body += piece
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError("the body did not come", 408, code="timeout") from None
        if max(announced, read) > self._max_body:
            message_ = f"The body is larger than {self._max_body} bytes."
            raise ApiError(message_, 413, code="body_too_large")
        return bytes(body)


def _is_here(host: str) -> bool:
    """Whether a Host header names this machine as a client on it would."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found["six"] or found["name"])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
