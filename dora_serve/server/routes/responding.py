"""`/v1/responses`: a chat in OpenAI's newer form. Nothing is kept, so turns are sent each time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..state import note, state_of
from ..wire import replies
from ..wire.pieces import Json, as_event
from ..wire.replies import Output, Reply
from ..wire.responses import ResponsesRequest
from ..wire.sending import EventStream, while_there, whole
from .generating import FEW, begin_chat
from .reading import JsonRoute
from .searching import Answering
from .writing import ChatWriter

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses", response_model=Reply)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation of items: messages, calls of functions and what these said."""
    begun = await begin_chat(body.chat, request)
    head = replies.reply(body, begun.served.model.name, begun.draw)
    note(request, model=head["model"], prompt_tokens=begun.asking.prompt_tokens, id=head["id"])
    if body.stream:
        events = _events(request, begun.asking, head, begun.write)
        return EventStream(events, state_of(request).options.timeout)
    return await while_there(request, _whole(request, begun.asking, head, begun.write))


async def _whole(request: Request, asking: Answering, head: Json, write: ChatWriter) -> Response:
    output = Output()
    async with aclosing(_grown(request, asking, output, write)) as events:
        async for _ in events:
            pass

    def answer() -> Response:
        return whole(_ended(asking, head, output)[0])

    return answer() if asking.tokens < FEW else await asyncio.to_thread(answer)


async def _grown(
    request: Request, asking: Answering, output: Output, write: ChatWriter
) -> AsyncGenerator[Json, None]:
    """Let `output` grow to its end, and tell of it."""
    async with aclosing(asking.news()) as news:
        async for index, delta in news:
            note(request, completion_tokens=asking.tokens, reason=delta.reason)
            for event in output.add(write(index, delta)):
                yield event


def _ended(asking: Answering, head: Json, output: Output) -> tuple[Json, list[Json]]:
    """The answer, and what is told of its last item."""
    status: replies.Status = "incomplete" if output.reason == "length" else "completed"
    events = list(output.end(status))
    why = {"reason": "max_output_tokens"} if status == "incomplete" else None
    used = replies.usage(asking.prompt_tokens, asking.tokens, asking.cached_tokens)
    more = {"status": status, "incomplete_details": why, "output": output.items, "usage": used}
    return {**head, **more}, events


async def _events(
    request: Request, asking: Answering, head: Json, write: ChatWriter
) -> AsyncGenerator[bytes, None]:
    """As OpenAI's clients put them together. The last event says "completed" as vLLM's does, where
    the answer was cut off too."""
    output, number = Output(), 0

    def sent(event: Json) -> bytes:
        nonlocal number
        said = as_event({**event, "sequence_number": number}, event["type"])
        number += 1
        return said

    async with aclosing(_grown(request, asking, output, write)) as events:
        yield sent({"type": "response.created", "response": head})
        yield sent({"type": "response.in_progress", "response": head})
        async for event in events:
            yield sent(event)

    def last() -> bytes:
        answer, events = _ended(asking, head, output)
        return b"".join(map(sent, [*events, {"type": "response.completed", "response": answer}]))

    yield last() if asking.tokens < FEW else await asyncio.to_thread(last)
