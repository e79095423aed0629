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
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>[0-9]{0,5}))?")
_OWN = {b"same-origin", b"none"}  # what browsers say of a page of ours, and of a typed address
_SHORT = 64 << 10  # bytes of a body where none, or a name, is expected
_HELD = 32  # bodies' bounds that are held at once, whoever sent them
_DRAIN = 4  # bodies' bounds that are read and dropped, so that a client gets to read the refusal
_BODY_SECONDS = 60
_UNREAD = {400, 408, 413, 503}  # of the body's remainder nothing is known


class Guard:
    """Refuses with 401 what lacks `api_key` (None: nothing does), with 403 what a page of another
    site sends, with 413 what is larger than `max_body`, and writes a line of JSON per request,
    without any of its text. `local`: refuse with 403 what names this server otherwise than a client
    on this machine would. `page`: paths that are served without a key."""

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
        self._key = None if api_key is None else api_key.encode()
        self._held = 0  # bytes of bodies
        self._open = _OPEN | page
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the path of no other protocol leads anywhere
            await send({"type": "websocket.close", "code": 1008})
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
            answer = error.response()
            if error.status in _UNREAD:
                answer.headers["Connection"] = "close"
            await answer(scope, receive, watch)
        except asyncio.CancelledError:  # by the server, which ends and waits no longer
            if notes["status"] == 499:  # no answer has begun
                ending = ApiError("The server is ending.", 503, code="ending")
                await ending.response()(scope, receive, watch)
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
        # Before anything else: what comes behind is none of this client's, perhaps, and cut off.
        if b"transfer-encoding" in headers and b"content-length" in headers:
            raise ApiError("The body's length is told twice.", 400, code="two_lengths")
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if self._local and not all(map(_is_here, hosts)):
            # A page from elsewhere may let its own name lead here, and then read the answers.
            raise ApiError("This server answers to localhost alone.", 403, code="other_host")
        closed = scope["path"] not in self._open
        if closed:
            if _crosses(headers):
                raise ApiError("Pages of other sites may not ask.", 403, code="cross_site")
            if self._key is not None:
                scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
                same = hmac.compare_digest(given, self._key)
                if scheme.lower() != b"bearer" or not same:
                    raise ApiError("This server needs an API key.", 401, code="invalid_api_key")
        short = scope["method"] != "POST" or scope["path"].endswith("_lora_adapter")
        bound = min(self._max_body, _SHORT) if short else self._max_body
        if not closed:  # nothing is held of who has no key, or there would be no room for others'
            bound = 0
        body, whole = bytearray(), b""
        try:
            await self._fill(body, bound, headers, receive)
            whole = bytes(body)
            body.clear()  # one copy is enough
            await self._app(scope, _replay(whole, receive), send)
        finally:
            self._held -= len(body) + len(whole)

    async def _fill(
        self, body: bytearray, bound: int, headers: dict[bytes, bytes], receive: Receive
    ) -> None:
        length = headers.get(b"content-length", b"0")
        announced = int(length[:40]) if length.isdigit() else 0
        read = 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while max(announced, read) <= _DRAIN * bound:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("the client left", 499)
                    piece = message.get("body", b"")
                    read += len(piece)
                    if read <= bound:
                        body += piece
                        self._held += len(piece)
                    if self._held > _HELD * self._max_body:
                        raise ApiError("too many bodies at once", 503, code="busy")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError("the body did not come", 408, code="timeout") from None
        if max(announced, read) > bound:
            raise ApiError(f"The body is larger than {bound} bytes.", 413, code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Tells the whole body, then what `receive` tells."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay


def _crosses(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that a page of another site asks: by Sec-Fetch-Site, which it sends to
    the loopback and over TLS, or by Origin, which it sends wherever more than reading is asked."""
    site = headers.get(b"sec-fetch-site")
    if site is not None and site not in _OWN:
        return True
    origin = headers.get(b"origin")
    if origin is None or site == b"same-origin":  # behind a proxy the Host may be another
        return False
    _, found, place = origin.partition(b"://")
    return not found or place.lower() != headers.get(b"host", b"").lower()


def _is_here(host: str) -> bool:
    """Whether a Host header names this machine as a client on it would."""
    found = _HOST.fullmatch(host)
    if found is None or int(found["port"] or 0) > 65535:
        return False
    if found["six"] is not None:
        return ":" in found["six"] and is_loopback(found["six"])
    return is_loopback(found["name"])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
