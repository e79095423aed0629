"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from dora_serve.onnxruntime.continuous import ContinuousDecoder, Delta

from ..state import note, state_of
from ..wire import answers, pieces
from ..wire.errors import ApiError
from ..wire.pieces import Choice, Json
from ..wire.requests import ChatRequest, CompletionRequest, StreamOptions
from ..wire.sending import EventStream, while_there
from .asking import Asking, check_count, check_logprobs
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)

_FEW = 500  # tokens, which are written out at once

# The JSON of a choice by its index, whole or what it grew by.
Write = Callable[[int, Choice | Delta], Json]


@router.post("/v1/completions", response_model=answers.Completion)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt, or several."""
    state = state_of(request)
    served, engine = state.models.decoder(body.model)
    check_count(engine, len(body.prompts) * body.n)
    rows = await served.texts.encode(
        body.prompts, engine.max_length, "prompt", body.add_special_tokens
    )
    prompts = [ids for ids, _ in rows]
    for prompt in prompts:
        _check_length(engine, prompt, body.max_tokens)
    most = min(body.max_tokens, engine.max_length)
    check_logprobs(len(prompts) * body.n, most, body.logprobs)
    draws = [[body.sampling(i, most, body.logprobs) for i in range(body.n)] for _ in prompts]
    decode = _decoder(engine)
    offsets = [0] * (len(prompts) * body.n)

    def write(index: int, grown: Choice | Delta) -> Json:
        told = None
        if body.logprobs is not None:
            told = pieces.completion_logprobs(grown, decode, offsets[index])
            offsets[index] += sum(map(len, told["tokens"]))
        text, reason = grown.text, grown.reason
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    asking = Asking(served, engine, prompts, draws, state.metrics, state.options.timeout)
    head = pieces.envelope("cmpl", "text_completion", served.model.name, body.request_id)
    return await _answer(body, request, asking, head, write)


@router.post("/v1/chat/completions", response_model=answers.ChatCompletion)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, through the chat template of the model's tokenizer."""
    state = state_of(request)
    served, engine = state.models.decoder(body.model)
    messages = [message.plain() for message in body.messages]
    prompt = await served.texts.chat(
        messages,
        body.add_generation_prompt,
        engine.max_length,
        body.template_values(),
        body.continue_final_message,
        bool(body.add_special_tokens),
    )
    wanted = body.max_completion_tokens or body.max_tokens
    _check_length(engine, prompt, wanted)
    top = body.top_logprobs if body.logprobs else None
    most = engine.max_length if wanted is None else wanted
    check_logprobs(body.n, min(most, engine.max_length), top)
    draws = [[body.sampling(i, most, top) for i in range(body.n)]]
    decode = _decoder(engine)
    begun: set[int] = set()

    def write(index: int, grown: Choice | Delta) -> Json:
        told = None if top is None else pieces.chat_logprobs(grown, decode)
        message = {"content": grown.text}
        if index not in begun:
            message = {"role": "assistant", **message}
            begun.add(index)
        part = "delta" if body.stream else "message"
        return {"index": index, part: message, "logprobs": told, "finish_reason": grown.reason}

    asking = Asking(served, engine, [prompt], draws, state.metrics, state.options.timeout)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = pieces.envelope("chatcmpl", kind, served.model.name, body.request_id)
    return await _answer(body, request, asking, head, write)


def _check_length(engine: ContinuousDecoder, prompt: Sequence[int], wanted: int | None) -> None:
    length = len(prompt) + (wanted or 1)
    if length > engine.max_length:
        raise ApiError(
            f"This model's maximum context length is {engine.max_length} tokens, but the prompt "
            f"has {len(prompt)} tokens and {wanted or 1} more are asked for.",
            param="max_tokens" if len(prompt) < engine.max_length else "prompt",
            code="context_length_exceeded",
        )


def _decoder(engine: ContinuousDecoder) -> Callable[[int], str]:
    tokenizer = engine.tokenizer
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False))


async def _answer(
    body: CompletionRequest | ChatRequest,
    request: Request,
    asking: Asking,
    head: Json,
    write: Write,
) -> Response:
    note(request, model=head["model"], prompt_tokens=asking.prompt_tokens, id=head["id"])
    if body.stream:
        options = body.stream_options or StreamOptions()
        events = _events(request, asking, head, write, options)
        return EventStream(events, state_of(request).options.timeout)
    return await while_there(request, _whole(request, asking, head, write))


async def _whole(request: Request, asking: Asking, head: Json, write: Write) -> Response:
    choices = [Choice() for _ in range(asking.count)]
    async with aclosing(asking.news()) as news:
        async for index, delta in news:
            choices[index].add(delta)
    note(request, completion_tokens=asking.tokens, reason=choices[0].reason)

    def answer() -> Response:
        written = [write(i, choice) for i, choice in enumerate(choices)]
        used = pieces.usage(asking.prompt_tokens, asking.tokens)
        return JSONResponse({**head, "choices": written, "usage": used})

    return answer() if asking.tokens < _FEW else await asyncio.to_thread(answer)


async def _events(
    request: Request, asking: Asking, head: Json, write: Write, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    more: dict[str, Any] = {"usage": None} if options.include_usage else {}
    async with aclosing(asking.news()) as news:
        async for index, delta in news:
            note(request, completion_tokens=asking.tokens, reason=delta.reason)
            if delta.text or delta.logprobs or delta.reason:
                if options.include_usage and options.continuous_usage_stats:
                    more["usage"] = pieces.usage(*asking.lengths(index))
                yield pieces.as_event({**head, "choices": [write(index, delta)], **more})
    if options.include_usage:
        used = pieces.usage(asking.prompt_tokens, asking.tokens)
        yield pieces.as_event({**head, "choices": [], "usage": used})
    yield pieces.DONE
