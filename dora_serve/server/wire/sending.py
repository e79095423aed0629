"""Answers whose client may leave, or read slowly, while they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from .errors import ApiError, as_api_error, event
from .pieces import Json

T = TypeVar("T")


def whole(answer: Json) -> Response:
    """`answer` as JSON, written several times as fast as Python's own module does, which lets
    nobody else run until megabytes are written."""
    return Response(to_json(answer), media_type="application/json")


async def beside(make: Callable[[], BaseModel]) -> Response:
    """What `make` tells, told and written in a thread: of a million numbers either takes a while,
    and what FastAPI makes of an answer by itself it makes where all others wait."""

    def write() -> Response:
        return Response(make().model_dump_json(), media_type="application/json")

    return await asyncio.to_thread(write)


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled when the client leaves, and `ApiError` 499 raised, which
    nobody reads."""
    task = asyncio.ensure_future(work)
    if not await _first(task, request.receive, None):
        raise ApiError("the client left", 499)
    return task.result()


async def _first(task: asyncio.Future[T], receive: Receive, timeout: float | None) -> bool:
    """Whether `task` ends before the client leaves and time is up; else it is cancelled."""
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        both: set[asyncio.Future[Any]] = {task, leaving}
        await asyncio.wait(both, timeout=timeout, return_when="FIRST_COMPLETED")
        return task.done()
    finally:
        left = [each for each in (task, leaving) if not each.done()]
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. Before the first, an error still gets a status of its own; the stream
    ends when the client leaves, or has not read all of it in `timeout` seconds."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], timeout: float) -> None:
        self._events, self._timeout = events, timeout
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            task = asyncio.ensure_future(self._send(scope, receive, send))
            if await _first(task, receive, self._timeout):
                task.result()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._events)
        except Exception as error:
            await as_api_error(error).response()(scope, receive, send)
            return
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _piece(send, first)
        try:
            async for piece in self._events:
                await _piece(send, piece)
        except Exception as error:
            await _piece(send, event(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _piece(send: Send, body: bytes) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": body, "more_body": True})
