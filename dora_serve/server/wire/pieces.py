"""Completions and chats as JSON, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dora_serve.onnxruntime.generation import Logprobs, PromptLogprobs
from dora_serve.onnxruntime.request import Delta

Json = dict[str, Any]
Decode = Callable[[int], str]

_LEAST = -9999.0  # JSON has no infinity
# What httpx and Python's own `splitlines` take for an end of a line beside those that JSON escapes
_BREAKS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"}


def usage(prompt: int, completion: int, cached: int | None = None) -> Json:
    """`cached`: how many tokens of the prompt were not computed again, where that is told."""
    total = prompt + completion
    used = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return used | details


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def envelope(prefix: str, kind: str, model: str, given: str | None = None) -> Json:
    """What every piece of one answer repeats. `given`: the client's own id of the request."""
    number = new_id(prefix) if given is None else f"{prefix}-{given}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": model}


def as_event(content: Json, name: str | None = None) -> bytes:
    """A server-sent event, called `name` where it has one."""
    said = json.dumps(content, ensure_ascii=False).translate(_BREAKS)
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {said}\n\n".encode()


DONE = b"data: [DONE]\n\n"


# A token with its log-probability and the likeliest ones', None where those are not told.
Step = tuple[int, Logprobs | None]


@dataclass
class Choice:
    """What a choice has become: its deltas put together."""

    text: str = ""
    steps: list[Step] = field(default_factory=list)
    reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.steps += delta.steps
        self.reason, self.stop_reason = delta.reason, delta.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs


def echoed(prompt: Sequence[int], told: Sequence[PromptLogprobs]) -> list[Step]:
    """The steps of a prompt's tokens; nothing is told of the first."""
    return [
        (prompt[0], None),
        *((i, (own, best)) for i, (own, _, best) in zip(prompt[1:], told, strict=True)),
    ]


def completion_logprobs(steps: Sequence[Step], decode: Decode, offset: int) -> Json:
    """In the form of `/v1/completions`; `offset`: characters of the tokens before."""
    texts = [decode(token) for token, _ in steps]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [
        None if told is None else {**_by_text(told[1], decode), text: _finite(told[0])}
        for text, (_, told) in zip(texts, steps, strict=True)
    ]
    own = [None if told is None else _finite(told[0]) for _, told in steps]
    return {"text_offset": offsets, "token_logprobs": own, "tokens": texts, "top_logprobs": top}


def prompt_logprobs(
    prompt: Sequence[int], told: Sequence[PromptLogprobs], decode: Decode
) -> list[Json | None]:
    """As vLLM tells them: by token id, nothing of the first."""
    found: list[Json | None] = [None]
    for token, (own, rank, best) in zip(prompt[1:], told, strict=True):
        ranked = {token: (own, rank)}
        ranked |= {each: (value, i) for i, (each, value) in enumerate(best.items(), 1)}
        found.append(
            {
                str(each): {"logprob": _finite(value), "rank": i, "decoded_token": decode(each)}
                for each, (value, i) in ranked.items()
            }
        )
    return found


def _by_text(best: Mapping[int, float], decode: Decode) -> dict[str, Any]:
    """Of tokens with one text, such as a word with and without its space, the likeliest."""
    texts: dict[str, Any] = {}
    for token, value in best.items():
        texts.setdefault(decode(token), _finite(value))
    return texts


def chat_logprobs(steps: Sequence[Step], decode: Decode) -> Json:
    """In the form of `/v1/chat/completions`."""
    content = [
        {
            **_entry(decode(token), told[0]),
            "top_logprobs": [_entry(decode(i), value) for i, value in told[1].items()],
        }
        for token, told in steps
        if told is not None
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, value: float) -> Json:
    return {"token": text, "bytes": list(text.encode()), "logprob": _finite(value)}


def _finite(value: float) -> float:
    return max(value, _LEAST)
