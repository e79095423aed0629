"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dora_serve.onnxruntime.grammar import Grammar
from dora_serve.onnxruntime.limits import check_tokens
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.onnxruntime.seq2seq_queue import Seq2SeqQueue

from ..registry import Served
from ..registry import Writer as Engine
from ..state import State, note, state_of
from ..wire import answers, pieces
from ..wire.errors import ApiError
from ..wire.pieces import Choice, Json
from ..wire.requests import ChatRequest, CompletionRequest
from ..wire.sampling import Generate, StreamOptions
from ..wire.sending import EventStream, while_there, whole
from .asking import Asking, check_count, check_logprobs
from .reading import JsonRoute, plain
from .searching import Answering, Searching
from .writing import ChatWriter, CompletionWriter, Writer

router = APIRouter(route_class=JsonRoute)

FEW = 500  # tokens, which are written out at once


@router.post("/v1/completions", response_model=answers.Completion)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt, or several."""
    state = state_of(request)
    served, engine = state.models.writer(body.model)
    if isinstance(engine, Seq2SeqQueue) and (body.echo or body.prompt_logprobs is not None):
        param = "echo" if body.echo else "prompt_logprobs"
        raise ApiError("this model's answers do not go on with the prompt", param=param)
    check_count(engine, len(body.prompts) * body.n)
    wanted, own = body.max_tokens, served.defaults.max_new_tokens
    if isinstance(engine, Seq2SeqQueue) and own and "max_tokens" not in body.model_fields_set:
        wanted = min(own, engine.max_length)
    prompts = await _prompts(body, served, engine, wanted)
    most = min(wanted, served.defaults.longest or engine.max_length, engine.max_length)
    told, longest = body.told_of_prompt, max(map(len, prompts), default=0)
    check_logprobs(len(prompts) * body.n, most, body.logprobs)
    check_logprobs(len(prompts) * body.n, longest, told, "prompt")
    # Without a completion one token is drawn all the same, and counted, as vLLM does.
    bad, most = await served.texts.words(body.bad_words or ()), max(most, 1)
    grammar = await _grammar(body, state, engine)
    draws = [body.samplings(most, body.logprobs, bad, told, grammar, served.defaults)]
    check_tokens(draws[0][0].named_tokens, engine.vocabulary)
    texts = await _echoed(body, served, prompts)
    write = CompletionWriter(body, prompts, texts, _decoder(engine))
    top = body.logprobs
    if top is not None and body.use_beam_search:
        top += 1  # vLLM tells one more of beams
    asking = _asking(state, served, engine, prompts, body, draws, top)
    head = pieces.envelope("cmpl", "text_completion", served.model.name, body.request_id)
    return await _answer(body, request, asking, head, write)


async def _prompts(
    body: CompletionRequest, served: Served, engine: Engine, wanted: int
) -> list[list[int]]:
    kept = body.kept(_most(engine, wanted))
    rows = await served.texts.encode(
        body.prompts,
        engine.max_length,
        "prompt",
        body.add_special_tokens,
        kept,
        body.truncation_side,
    )
    for ids, _ in rows:
        _check_length(engine, ids, wanted)
    return [ids for ids, _ in rows]


async def _echoed(
    body: CompletionRequest, served: Served, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """The text of every prompt that is told, with its tokens where those are told as such."""
    if not body.echo or body.return_token_ids:
        return [""] * len(prompts)
    texts = []
    for given, ids in zip(body.prompts, prompts, strict=True):
        if not isinstance(given, str):
            given = str(json.loads(await served.texts.detokenize(ids))["prompt"])
        texts.append(given)
    return texts


@router.post("/v1/chat/completions", response_model=answers.ChatCompletion)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, through the chat template of the model's tokenizer."""
    begun = await begin_chat(body, request)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = pieces.envelope("chatcmpl", kind, begun.served.model.name, body.request_id)
    if body.return_token_ids:
        head["prompt_token_ids"] = begun.prompt
    return await _answer(body, request, begun.asking, head, begun.write)


@dataclass(frozen=True)
class BegunChat:
    """A conversation that is being answered. `draw`: how."""

    served: Served
    prompt: list[int]
    draw: Sampling
    asking: Answering
    write: ChatWriter


async def begin_chat(body: ChatRequest, request: Request) -> BegunChat:
    """Have a conversation answered. Raises `ApiError` for what is not possible."""
    state = state_of(request)
    served, engine = state.models.decoder(body.model)
    wanted = body.max_completion_tokens or body.max_tokens
    prompt = await served.texts.chat(
        await plain(body.messages),
        body.add_generation_prompt,
        engine.max_length,
        body.template_values(),
        body.continue_final_message,
        bool(body.add_special_tokens),
        body.kept(_most(engine, wanted)),
        body.truncation_side,
    )
    _check_length(engine, prompt, wanted)
    top = body.top_logprobs if body.logprobs else None
    most = wanted or served.defaults.max_new_tokens or engine.max_length
    most = min(most, served.defaults.longest or engine.max_length, engine.max_length)
    check_logprobs(body.n, most, top)
    check_logprobs(body.n, len(prompt), body.prompt_logprobs, "messages")
    bad = await served.texts.words(body.bad_words or ())
    told, grammar = body.prompt_logprobs, await _grammar(body, state, engine)
    draws = [body.samplings(most, top, bad, told, grammar, served.defaults)]
    check_tokens(draws[0][0].named_tokens, engine.vocabulary)
    asking = _asking(state, served, engine, [prompt], body, draws, top)
    write = ChatWriter(body, prompt, _decoder(engine))
    return BegunChat(served, prompt, draws[0][0], asking, write)


def _asking(
    state: State,
    served: Served,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    body: Generate,
    draws: list[list[Sampling]],
    top: int | None,
) -> Answering:
    metrics, timeout = state.metrics, state.options.timeout
    if not body.use_beam_search:
        return Asking(served, engine, prompts, draws * len(prompts), metrics, timeout)
    one = draws[0][0]
    if one.grammar is not None:
        raise ApiError("what an answer follows is not heeded", param="use_beam_search")
    return Searching(served, engine, prompts, body, one.max_tokens, top, metrics, timeout)


async def _grammar(body: Generate, state: State, engine: Engine) -> Grammar | None:
    """What every choice has to follow. It is read in a process with bounds first."""
    try:
        wanted = body.structure()
    except ValueError as error:
        raise ApiError(str(error), code="bad_grammar") from None
    if wanted is None:
        return None
    _, text = await state.grammars.call("grammar", json.dumps(wanted).encode())
    return await asyncio.to_thread(engine.grammars.compile, text.decode())


def _most(engine: Engine, wanted: int | None) -> int:
    """How many tokens of a prompt leave room for as many more as are wanted."""
    if isinstance(engine, Seq2SeqQueue):  # an answer takes nothing of it
        return engine.max_length
    return max(engine.max_length - max(wanted or 1, 1), 1)


def _check_length(engine: Engine, prompt: Sequence[int], wanted: int | None) -> None:
    wanted = 1 if wanted is None else wanted
    if wanted > engine.room(prompt):
        raise ApiError(
            f"This model's maximum context length is {engine.max_length} tokens, but the prompt "
            f"has {len(prompt)} tokens and {wanted} more are asked for.",
            param="max_tokens" if len(prompt) < engine.max_length else "prompt",
            code="context_length_exceeded",
        )


def _decoder(engine: Engine) -> Callable[[int], str]:
    tokenizer = engine.tokenizer
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False))


async def _answer(
    body: CompletionRequest | ChatRequest,
    request: Request,
    asking: Answering,
    head: Json,
    write: Writer,
) -> Response:
    note(request, model=head["model"], prompt_tokens=asking.prompt_tokens, id=head["id"])
    if body.stream:
        options = body.stream_options or StreamOptions()
        events = _events(request, asking, head, write, options)
        return EventStream(events, state_of(request).options.timeout)
    return await while_there(request, _whole(request, asking, head, write))


async def _whole(request: Request, asking: Answering, head: Json, write: Writer) -> Response:
    choices = [Choice() for _ in range(asking.count)]
    async with aclosing(asking.news()) as news:
        async for index, delta in news:
            choices[index].add(delta)
    note(request, completion_tokens=asking.tokens, reason=choices[0].reason)

    def answer() -> Response:
        written = [write(i, choice) for i, choice in enumerate(choices)]
        used = pieces.usage(asking.prompt_tokens, asking.tokens, asking.cached_tokens)
        return whole({**head, "choices": written, "usage": used, **write.beside(choices)})

    few = asking.tokens + sum(len(choice.prompt_logprobs) for choice in choices) < FEW
    return answer() if few else await asyncio.to_thread(answer)


async def _events(
    request: Request, asking: Answering, head: Json, write: Writer, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    more: dict[str, Any] = {"usage": None} if options.include_usage else {}
    async with aclosing(asking.news()) as news:
        async for index, delta in news:
            note(request, completion_tokens=asking.tokens, reason=delta.reason)
            if delta.text or delta.reason or write.tells(delta):
                if options.include_usage and options.continuous_usage_stats:
                    more["usage"] = pieces.usage(*asking.lengths(index))
                yield pieces.as_event({**head, "choices": [write(index, delta)], **more})
    if options.include_usage:
        used = pieces.usage(asking.prompt_tokens, asking.tokens, asking.cached_tokens)
        yield pieces.as_event({**head, "choices": [], "usage": used})
    yield pieces.DONE
