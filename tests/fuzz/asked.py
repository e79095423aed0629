"""What clients send, as fuzzing targets: bodies, and what an answer has to follow."""

from __future__ import annotations

import contextlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dora_serve.onnxruntime.grammar import Grammars
from dora_serve.server.bounded.grammars import read
from dora_serve.server.bounded.work import BODIES, fault, read_body
from dora_serve.server.wire.defaults import Defaults
from dora_serve.server.wire.errors import ApiError
from dora_serve.server.wire.requests import CompletionRequest
from dora_serve.server.wire.sampling import Generate
from tests.server.test_structure import bytes_tokenizer

_SCHEMA: Any = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {}}}
_TURN = {"role": "user", "content": [{"type": "text", "text": "a"}]}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_BODIES: list[tuple[str, dict[str, object]]] = [
    ("CompletionRequest", {"prompt": [[5, 6]], "n": 2, "stop": ["a"], "temperature": 0.5}),
    ("CompletionRequest", {"prompt": "a", "structured_outputs": {"json": _SCHEMA}, "seed": 1}),
    ("ChatRequest", {"messages": [_TURN], "response_format": {"type": "json_object"}}),
    ("ChatRequest", {"messages": [{"role": "assistant", "tool_calls": [_CALL]}, _TURN]}),
    ("ChatRequest", {"messages": [_TURN], "tools": [_TOOL], "tool_choice": "required"}),
    ("EmbeddingRequest", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("ClassifyRequest", {"input": "a"}),
    ("PoolingRequest", {"input": [[5]], "task": "token_embed"}),
    ("ScoreRequest", {"text_1": "a", "text_2": ["a", "b"]}),
    ("RerankRequest", {"query": "a", "documents": ["a", "b"], "top_n": 1}),
    ("ResponsesRequest", {"input": "a", "instructions": "b", "text": {"format": {"type": "text"}}}),
    ("ResponsesRequest", {"input": [{**_TURN, "type": "message"}], "truncation": "auto"}),
    ("ResponsesRequest", {"input": [{"type": "function_call_output", "call_id": "1", "output": "a"},
                                    {"type": "function_call", "call_id": "1", "name": "f",
                                     "arguments": "{}"},
                                    {"type": "reasoning", "summary": [{"type": "summary_text",
                                                                       "text": "a"}]}]}),
    ("TokenizeRequest", {"messages": [{"role": "user", "content": "a"}]}),
    ("DetokenizeRequest", {"tokens": [5, 6]}),
    ("LoadRequest", {"lora_name": "a", "lora_path": "b"}),
    ("Invocation", {"query": "a", "documents": ["b"]}),
]  # fmt: skip


def bodies(folder: Path) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    return [json.dumps({"model": "m", **body}).encode() for _, body in _BODIES]


def read_bodies(_: Path, data: bytes) -> None:
    """As a route does before it asks a model."""
    for kind in dict(_BODIES):
        try:
            body = read_body(BODIES[kind], data)
        except ValueError as error:
            assert len(json.dumps(fault(error)).encode()) < 4000
        else:
            with contextlib.suppress(ApiError):
                _use(body)


def _use(body: Any) -> None:
    body = getattr(body, "chat", getattr(body, "root", body))
    for name in ("template_values", "structure"):
        with contextlib.suppress(ValueError):  # of a structure that nothing can have
            json.dumps(getattr(body, name, dict)())
    json.dumps([message.plain() for message in getattr(body, "messages", None) or ()])
    json.dumps([getattr(body, "inputs", None), getattr(body, "prompts", None)])
    if isinstance(body, Generate):
        body.samplings(64, None, (), None, None, Defaults())


def structures(folder: Path) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 3}
    numbers = {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["a", 1, None]}]}
    schemas = [_SCHEMA, limits, numbers, {"type": "string", "pattern": "^a+$"}]
    given: list[dict[str, Any]] = [{"json": each} for each in schemas]
    given += [{"json": _SCHEMA, "disable_additional_properties": True, "whitespace_pattern": " *"}]
    given += [{"regex": "(a|b){2,9}c"}, {"choice": ["a", "b"]}, {"json_object": True}]
    given += [{"grammar": 'start: a{1,3} "b"\na: /[a-z]/ | start'}]
    return [json.dumps(each).encode() for each in given]


@cache
def _grammars() -> Grammars:
    tokenizer = bytes_tokenizer()
    return Grammars(tokenizer, tokenizer.get_vocab_size(), frozenset({1}))


def read_structure(_: Path, data: bytes) -> None:
    """A schema, pattern or grammar, read and followed for some tokens."""
    with contextlib.suppress(ValueError, RecursionError, ApiError):
        asked = {"model": "m", "prompt": "a", "structured_outputs": json.loads(data)}
        wanted = CompletionRequest.model_validate(asked).structure()
        if wanted is None:
            return
        _, text = read(json.dumps(wanted).encode())
        _follow(text.decode())


def _follow(text: str) -> None:
    grammars = _grammars()
    follow = grammars.compile(text).begin()
    for _ in range(8):
        allowed = np.flatnonzero(np.isfinite(follow(np.zeros(330, np.float32))))
        if not len(allowed):
            return
        follow.take(int(allowed[-1]))
