"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from dora_serve.engines.continuous import ContinuousDecoder
from dora_serve.engines.generation import Logprobs

from . import answers, pieces
from .asking import Asking
from .errors import ApiError
from .pieces import Choice, Json
from .requests import ChatRequest, CompletionRequest
from .sending import EventStream, while_there
from .state import note, state_of

router = APIRouter()
_LONG = 20_000  # characters that are not tokenized in the event loop

# The JSON of one choice: its index, text, tokens, log-probabilities, characters before, and reason.
Write = Callable[[int, str, Sequence[int], Sequence[Logprobs], int, str | None], Json]


@router.post("/v1/completions", response_model=answers.Completion)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt, or several."""
    state = state_of(request)
    served, engine = state.models.decoder(body.model)
    prompts = [await encode(engine, prompt) for prompt in body.prompts]
    for prompt in prompts:
        _check_length(engine, prompt, body.max_tokens)
    most = engine.max_length if body.max_tokens is None else body.max_tokens
    draws = [[body.sampling(i, most, body.logprobs) for i in range(body.n)] for _ in body.prompts]
    decode = _decoder(engine)

    def write(
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[Logprobs],
        offset: int,
        reason: str | None,
    ) -> Json:
        told = None
        if body.logprobs is not None:
            told = pieces.completion_logprobs(tokens, logprobs, decode, offset)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    asking = Asking(served, engine, prompts, draws, state.metrics, state.options.timeout)
    head = pieces.envelope("cmpl", "text_completion", served.model.name)
    return await _answer(body, request, asking, head, head, write, write)


@router.post("/v1/chat/completions", response_model=answers.ChatCompletion)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, through the chat template of the model's tokenizer."""
    state = state_of(request)
    served, engine = state.models.decoder(body.model)
    messages = [message.plain() for message in body.messages]
    text = served.template.render(messages, body.add_generation_prompt)
    prompt = await encode(engine, text, special=False)
    wanted = body.max_completion_tokens or body.max_tokens
    _check_length(engine, prompt, wanted)
    top = (body.top_logprobs or 0) if body.logprobs else None
    most = engine.max_length if wanted is None else wanted
    draws = [[body.sampling(i, most, top) for i in range(body.n)]]
    decode = _decoder(engine)

    def told(tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> Json | None:
        return None if top is None else pieces.chat_logprobs(tokens, logprobs, decode)

    def whole(
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[Logprobs],
        _: int,
        reason: str | None,
    ) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        probable = told(tokens, logprobs)
        return {
            "index": index,
            "message": message,
            "logprobs": probable,
            "finish_reason": reason,
        }

    begun: set[int] = set()

    def piece(
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[Logprobs],
        _: int,
        reason: str | None,
    ) -> Json:
        delta = {"content": text} if index in begun else {"role": "assistant", "content": text}
        begun.add(index)
        probable = told(tokens, logprobs)
        return {"index": index, "delta": delta, "logprobs": probable, "finish_reason": reason}

    asking = Asking(served, engine, [prompt], draws, state.metrics, state.options.timeout)
    head = pieces.envelope("chatcmpl", "chat.completion", served.model.name)
    return await _answer(
        body, request, asking, head, {**head, "object": "chat.completion.chunk"}, whole, piece
    )


async def encode(
    engine: ContinuousDecoder, prompt: str | list[int], special: bool = True
) -> list[int]:
    """Token ids of a text; ids stay as they are."""
    if not isinstance(prompt, str):
        return prompt
    work = engine.graph.tokenizer.encode
    if len(prompt) < _LONG:
        return list(work(prompt, add_special_tokens=special).ids)
    return list((await asyncio.to_thread(work, prompt, add_special_tokens=special)).ids)


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
    tokenizer = engine.graph.tokenizer
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False))


async def _answer(
    body: CompletionRequest | ChatRequest,
    request: Request,
    asking: Asking,
    head: Json,
    piece_head: Json,
    whole: Write,
    piece: Write,
) -> Response:
    note(request, model=head["model"], prompt_tokens=asking.prompt_tokens, id=head["id"])
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(request, asking, piece_head, piece, with_usage)
        return EventStream(events, state_of(request).options.timeout)
    content = await while_there(request, _whole(request, asking, head, whole))
    return JSONResponse(content)


async def _whole(request: Request, asking: Asking, head: Json, write: Write) -> Json:
    choices = {index: Choice() for index in range(asking.count)}
    async with aclosing(asking.news()) as news:
        async for index, update in news:
            choices[index].add(update)
    note(request, completion_tokens=asking.tokens, reason=choices[0].reason)
    written = [
        write(i, each.text, each.tokens, each.logprobs, 0, each.reason)
        for i, each in choices.items()
    ]
    return {**head, "choices": written, "usage": pieces.usage(asking.prompt_tokens, asking.tokens)}


async def _events(
    request: Request, asking: Asking, head: Json, write: Write, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    offsets = [0] * asking.count
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    async with aclosing(asking.news()) as news:
        async for index, update in news:
            if update.text or update.logprobs or update.reason:
                choice = write(
                    index,
                    update.text,
                    update.tokens,
                    update.logprobs,
                    offsets[index],
                    update.reason,
                )
                offsets[index] += sum(map(len, (choice["logprobs"] or {}).get("tokens", ())))
                yield pieces.as_event({**head, "choices": [choice], **more})
            note(request, completion_tokens=asking.tokens, reason=update.reason)
    if with_usage:
        used = pieces.usage(asking.prompt_tokens, asking.tokens)
        yield pieces.as_event({**head, "choices": [], "usage": used})
    yield pieces.DONE
