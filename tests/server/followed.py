"""Schemas, patterns and grammars that a model follows token by token, and what else a valid request
may make expensive: more rows of `test_attacks.py`."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tests.server.attacks import Attack, complete, head, post
from tests.server.conftest import EMBEDS, SENTIMENT
from tests.server.test_structure import MODEL

_EITHER = (200, 400)
_TURN = {"role": "user", "content": "one"}


def follows(*fine: int, n: int = 1, **structure: Any) -> Attack:
    """Asked of a model that says anything, so that what is followed leads far."""
    asked = {"model": MODEL, "prompt": "say", "max_tokens": 500, "n": n, "seed": 1}
    return complete(lambda: {**asked, "structured_outputs": structure}, *fine)


def chats(*fine: int, **more: Any) -> Attack:
    asked = {"model": MODEL, "messages": [_TURN], "max_tokens": 100, "seed": 1, **more}
    return post("/v1/chat/completions", lambda: asked, *fine)


def responds(given: Any, *fine: int, **more: Any) -> Attack:
    asked = {"model": MODEL, "max_output_tokens": 1, "input": given, **more}
    return post("/v1/responses", lambda: asked, *fine)


def _doubled(depth: int) -> dict[str, Any]:
    """A schema whose objects are 2 ** depth when each reference is written out."""
    steps = {
        f"a{i}": {"properties": {key: {"$ref": f"#/$defs/a{i + 1}"} for key in "xy"}}
        for i in range(depth)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{depth}": {"type": "string"}}}


def _tool(schema: object, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def _chain(length: int, rule: str) -> str:
    """A grammar of so many rules, each written with the next."""
    rules = (f"r{i}: {rule.format(f'r{i + 1}')}" for i in range(length))
    return "\n".join(["start: r0", *rules, f'r{length}: "a"'])


def _nested(depth: int) -> bytes:
    asked = {"model": MODEL, "messages": [_TURN], "chat_template_kwargs": {"a": "@"}}
    return json.dumps(asked).encode().replace(b'"@"', b'{"a":' * depth + b"1" + b"}" * depth)


def _abandons(stream: bool, count: int) -> Attack:
    """Clients that ask for much and reset the connection, some once it comes."""

    def send(address: tuple[str, int]) -> Iterator[int]:
        asked: dict[str, Any] = {"model": MODEL, "prompt": "say", "n": 16, "ignore_eos": True}
        body = json.dumps({**asked, "max_tokens": 500, "stream": stream}).encode()
        for number in range(count):
            with socket.create_connection(address, timeout=60) as bare:
                bare.sendall(head("/v1/completions", f"Content-Length: {len(body)}") + body)
                if stream and number % 8 == 0:
                    with suppress(ConnectionError):
                        bare.recv(100)
                bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        yield 0

    return Attack(lambda: send, frozenset({0}))


_PARTS = [{"type": "input_text", "text": ""}]
_LOOP = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
_RULES = "\n".join(f"r{i}: /[a-z]{{1,{i + 1}}}/ r{(i * 7 + 1) % 500}" for i in range(500))
_LEXEMES = "\n".join(f"T{i}: /[a-z ]*x{i}[a-z ]*/" for i in range(800))
FOLLOWED: dict[str, Attack] = {
    "references that double": follows(json=_doubled(300)),
    "a reference to itself": follows(json={"$ref": "#"}),
    "references to each other": follows(json={"$ref": "#/$defs/a", "$defs": _LOOP}),
    "a reference to a file": follows(json={"$ref": "file:///etc/passwd"}),
    "a reference to elsewhere": follows(json={"$ref": "http://127.0.0.1:9/schema"}),
    "a grammar of a file": follows(grammar='start: %json {"$ref": "file:///etc/passwd"}'),
    "a schema in each other": follows(
        *_EITHER,
        n=16,
        json={
            "$ref": "#/$defs/n",
            "$defs": {
                "n": {"type": "object", "properties": {k: {"$ref": "#/$defs/n"} for k in "ab"}}
            },
        },
    ),
    "a multiple that takes minutes": follows(json={"type": "integer", "multipleOf": 3_000_017}),
    "multiples": follows(
        *_EITHER,
        n=16,
        json={"properties": {f"a{i}": {"multipleOf": 9973 + 2 * i} for i in range(99)}},
    ),
    "repeats in repeats": follows(
        *_EITHER, grammar='start: b{1,9999}\nb: c{1,9999}\nc: "x"{1,9999}'
    ),
    "repeats of rules": follows(*_EITHER, grammar='start: a{1,99999}\na: "a" | "b" | a "c"'),
    "a hundred thousand letters": follows(200, n=16, regex="[a-z]{1,100000}"),
    "a letter far from the end": follows(*_EITHER, n=16, regex=".*a.{500}"),
    "letters far from the end": follows(*_EITHER, n=16, regex="(.*a.{16}|.*b.{17}|.*c.{18})"),
    "a string of a billion": follows(*_EITHER, json={"type": "string", "minLength": 10**9}),
    "a string as long as it may be": follows(
        *_EITHER,
        n=16,
        json={"type": "array", "items": {"type": "string", "maxLength": 100_000}},
    ),
    "alternatives of alternatives": follows(
        json={"allOf": [{"anyOf": [{"maxLength": i} for i in range(40)]}] * 20}
    ),
    "alternatives in arrays": follows(
        *_EITHER,
        n=16,
        json={"items": {"anyOf": [{"items": {"maxLength": i + 1}} for i in range(300)]}},
    ),
    "choices that begin alike": follows(
        *_EITHER, n=16, choice=["a" * i + "b" for i in range(1, 340)]
    ),
    "a hundred thousand choices": follows(choice=[f"{i}" for i in range(100_000)]),
    "read in a thousand ways": follows(
        *_EITHER, n=16, grammar='start: a a a a a a a a\na: start | "a" | "b" | ""'
    ),
    "read in all ways": follows(*_EITHER, grammar='start: start start | "a" | /[a-z ]/ | ""'),
    "many rules": follows(
        *_EITHER, n=16, grammar=f"start: {' | '.join(f'r{i}' for i in range(500))}\n{_RULES}"
    ),
    "many words at once": follows(
        *_EITHER, grammar=f"start: ({' | '.join(f'T{i}' for i in range(800))})*\n{_LEXEMES}"
    ),
    # As deep as the process that reads it could, and a thread of the server not.
    **{
        f"rules in one another, {length}{how}": follows(*_EITHER, grammar=_chain(length, rule))
        for length, how, rule in (
            *((n, "", "{}") for n in (300, 700, 1400, 2500, 2560, 2620, 2680)),
            *((n, " times over", "{}*") for n in (300, 2500)),
            *((n, " or none", '"b" {} | "c"') for n in (250, 2000)),
        )
    },
    "a tool that doubles": chats(tools=[_tool(_doubled(300))], tool_choice="required"),
    "types that lead to one another": chats(
        200,
        tools=[_tool({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 1000}}})],
        structured_outputs={"choice": ["<function=f><parameter=a>1</parameter></function>"]},
    ),
    "definitions that are a list": chats(tools=[_tool({"$defs": [[]]})], tool_choice="required"),
    "half a surrogate pair as a schema": follows(json="\ud800"),
    "tools to choose from": chats(
        *_EITHER,
        tools=[
            _tool({"properties": {f"{i:x}{j}": {} for j in range(20)}}, f"f{i}") for i in range(120)
        ],
        tool_choice="required",
    ),
    "a schema of an answer": chats(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"$ref": "http://127.0.0.1:9/a"}},
        }
    ),
    "values in values": post("/v1/chat/completions", lambda: _nested(2500)),
    "values in values, as long as may be": post("/v1/chat/completions", lambda: _nested(200_000)),
    "biases and stops": complete(
        lambda: {
            "model": MODEL,
            "prompt": "say",
            "n": 64,
            "max_tokens": 200,
            "logit_bias": {str(i): 1e308 for i in range(255)},
            "stop": ["a" * 990 + str(i) for i in range(16)],
            "stop_token_ids": [*range(200, 255)] * 16,
            "repetition_penalty": 1.1,
        },
        200,
    ),
    "a bias that is no number": complete(lambda: {"logit_bias": {"5": "1e400"}}),
    "eighteen letters in one": post(
        "/v1/embeddings", lambda: {"model": EMBEDS, "input": ["\ufdfa" * 1000] * 256}, *_EITHER
    ),
    "marks on one letter": complete(
        lambda: {"model": MODEL, "prompt": "e" + "\u0301" * 300_000}, *_EITHER
    ),
    "zeros and directions": complete(
        lambda: {"model": MODEL, "prompt": "\0\u202e\ufeff\U000e0001" * 100_000}, *_EITHER
    ),
    "names of other directions": chats(
        *_EITHER, tools=[_tool({}, "\u202e\0\x1b[2J")], tool_choice="required", user="\0\u2066"
    ),
    "texts to score": post(
        "/score", lambda: {"model": EMBEDS, "text_1": ["a"] * 2048, "text_2": ["b"] * 2048}
    ),
    "long texts to score": post(
        "/score", lambda: {"model": EMBEDS, "text_1": "a", "text_2": ["good " * 1500] * 255}
    ),
    "texts to score that are cut": post(
        "/v1/score",
        lambda: {
            "model": EMBEDS,
            "text_1": "a",
            "text_2": ["good " * 3000] * 100,
            "truncate_prompt_tokens": 10,
        },
        200,
    ),
    "texts to score of other types": post(
        "/score",
        lambda: {"model": EMBEDS, "text_1": "a", "text_2": ["b", 1, None, {}, ["c"]] * 100_000},
    ),
    "sides that do not fit": post(
        "/score", lambda: {"model": EMBEDS, "text_1": ["a", "b"], "text_2": ["c"] * 3}
    ),
    "pairs for labels": post(
        "/score", lambda: {"model": SENTIMENT, "text_1": "good", "text_2": ["film"] * 256}
    ),
    "documents to rank": post(
        "/rerank",
        lambda: {"model": EMBEDS, "query": "good", "documents": ["good film " * 8] * 255},
        200,
    ),
    "documents that are objects": post(
        "/v2/rerank", lambda: {"model": EMBEDS, "query": "a", "documents": [{"text": "a"}] * 90_000}
    ),
    "inputs of other types": post(
        "/pooling", lambda: {"model": EMBEDS, "input": [[5], "a", 5, None, [[5]]] * 90_000}
    ),
    "tokens without end to pool": post(
        "/pooling", lambda: {"model": EMBEDS, "input": [[5] * 5000] * 250, "task": "token_embed"}
    ),
    "items": responds([{"role": "user", "content": "a"}] * 100_000),
    "items of calls": responds(
        [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}] * 2048, *_EITHER
    ),
    "items of parts": responds([{"role": "user", "content": _PARTS * 50}] * 1900, *_EITHER),
    "parts of messages": chats(
        *_EITHER, messages=[{**_TURN, "content": [{"type": "text", "text": ""}] * 50}] * 1900
    ),
    "calls of messages": chats(
        messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 45}] * 1900,
    ),
    "thoughts": responds(
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": ""}] * 30}] * 1900,
        *_EITHER,
    ),
    "content in content": responds([{"role": "user", "content": [[[[[]]]]] * 50_000}]),
    "a schema of a response": responds(
        "a", text={"format": {"type": "json_schema", "name": "a", "schema": _doubled(300)}}
    ),
    "tools of a response": responds(
        "a", tools=[{"type": "function", "name": f"f{i}", "parameters": {}} for i in range(60_000)]
    ),
    "streams that are left": _abandons(True, 60),
    "answers that are left": _abandons(False, 60),
}
