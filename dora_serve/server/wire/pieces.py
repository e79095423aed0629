"""Completions and chats as JSON, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_serve.onnxruntime.continuous import Delta
from dora_serve.onnxruntime.generation import Logprobs

Json = dict[str, Any]
Decode = Callable[[int], str]

_LEAST = -9999.0  # JSON has no infinity


def usage(prompt: int, completion: int) -> Json:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def envelope(prefix: str, kind: str, model: str, given: str | None = None) -> Json:
    """What every piece of one answer repeats. `given`: the client's own id of the request."""
    number = new_id(prefix) if given is None else f"{prefix}-{given}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": model}


def as_event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """What a choice has become: its deltas put together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.reason = delta.reason


def completion_logprobs(grown: Choice | Delta, decode: Decode, offset: int) -> Json:
    """In the form of `/v1/completions`; `offset`: characters of the tokens before."""
    texts = [decode(token) for token in grown.tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [
        {**_by_text(best, decode), text: _finite(own)}
        for text, (own, best) in zip(texts, grown.logprobs, strict=True)
    ]
    own = [_finite(own) for own, _ in grown.logprobs]
    return {"text_offset": offsets, "token_logprobs": own, "tokens": texts, "top_logprobs": top}


def _by_text(best: Mapping[int, float], decode: Decode) -> dict[str, Any]:
    """Of tokens with one text, such as a word with and without its space, the likeliest."""
    texts: dict[str, Any] = {}
    for token, value in best.items():
        texts.setdefault(decode(token), _finite(value))
    return texts


def chat_logprobs(grown: Choice | Delta, decode: Decode) -> Json:
    """In the form of `/v1/chat/completions`."""
    content = [
        {
            **_entry(decode(token), own),
            "top_logprobs": [_entry(decode(i), value) for i, value in best.items()],
        }
        for token, (own, best) in zip(grown.tokens, grown.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, value: float) -> Json:
    return {"token": text, "bytes": list(text.encode()), "logprob": _finite(value)}


def _finite(value: float) -> float:
    return max(value, _LEAST)
