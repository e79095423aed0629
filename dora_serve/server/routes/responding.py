"""`/v1/responses`: a chat in OpenAI's newer form. Nothing is kept, so turns are sent each time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..state import note, state_of
from ..wire import replies
from ..wire.pieces import Choice, Json, as_event
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
    choice, output = Choice(), Output()
    async with aclosing(asking.news()) as news:
        async for _, delta in news:
            choice.add(delta)
    note(request, completion_tokens=asking.tokens, reason=choice.reason)

    def answer() -> Response:
        told = write(0, choice)
        for _ in output.add(told["message"], told["logprobs"]):
            pass
        return whole(_ended(asking, head, output, told["finish_reason"])[0])

    return answer() if asking.tokens < FEW else await asyncio.to_thread(answer)


def _ended(asking: Answering, head: Json, output: Output, reason: str) -> tuple[Json, list[Json]]:
    """The answer, and what is told of its last item."""
    status: replies.Status = "incomplete" if reason == "length" else "completed"
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
    output, number, reason = Output(), 0, ""

    def sent(event: Json) -> bytes:
        nonlocal number
        said = as_event({**event, "sequence_number": number}, event["type"])
        number += 1
        return said

    async with aclosing(asking.news()) as news:
        yield sent({"type": "response.created", "response": head})
        yield sent({"type": "response.in_progress", "response": head})
        async for index, delta in news:
            note(request, completion_tokens=asking.tokens, reason=delta.reason)
            told = write(index, delta)
            reason = told["finish_reason"] or reason
            for event in output.add(told["delta"], told["logprobs"]):
                yield sent(event)

    def last() -> bytes:
        answer, events = _ended(asking, head, output, reason)
        return b"".join(map(sent, [*events, {"type": "response.completed", "response": answer}]))

    yield last() if asking.tokens < FEW else await asyncio.to_thread(last)
