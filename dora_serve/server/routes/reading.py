"""Bodies: read beside the event loop where that takes long, and only when they say they are JSON.

A page of another site may send any body without asking first, but not with this Content-Type.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, get_type_hints

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from ..bounded.work import fault, read_body
from ..state import state_of
from ..wire.errors import ApiError
from ..wire.messages import Message
from .preparing import made

_SHORT = 16 << 10  # bytes, which take no time to speak of whatever they say


class JsonRoute(APIRoute):
    """A route whose parameter `body` is read here, and the model that it names made ready."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        kind: type[BaseModel] | None = get_type_hints(self.endpoint).get("body")

        async def read(request: Request) -> Response:
            if kind is not None:
                request = await _read(request, kind)
                await made(request, getattr(await request.json(), "model", None))
            return await handle(request)

        return read


async def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns as chat templates take them; of a hundred thousand calls that takes seconds."""
    return await asyncio.to_thread(lambda: [message.plain() for message in messages])


class _Read(Request):
    """A request whose body is an object already; FastAPI takes that as it is."""

    def __init__(self, request: Request, body: bytes, parsed: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._bytes, self._parsed = body, parsed

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._parsed


async def _read(request: Request, kind: type[BaseModel]) -> Request:
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said != "application/json":
        raise ApiError("the Content-Type is not application/json", code="not_json")
    body = await request.body()
    long = len(body) > _SHORT
    if long:  # what is wrong costs most
        wrong, _ = await state_of(request).bodies.call("check", body, kind=kind.__name__)
        if wrong is not None:
            raise RequestValidationError([wrong])
    try:
        read = await asyncio.to_thread(_read_long, kind, body) if long else read_body(kind, body)
        return _Read(request, body, read)
    except ValueError as error:
        raise RequestValidationError([fault(error)]) from None


def _read_long(kind: type[BaseModel], body: bytes) -> BaseModel:
    """Beside the event loop, since of a hundred thousand parts this takes a while; and nobody looks
    for garbage among a million new objects again and again, which took ten times as long."""
    gc.disable()
    try:
        return read_body(kind, body)
    finally:
        gc.enable()
