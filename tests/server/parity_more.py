"""What else is asked of vLLM and of the embedded server alike: every endpoint, streams, refusals.

`tests/data/vllm_answers_more.json` has vLLM's answers, by the server that was asked: a decoder, one
with defaults of its own, a classifier and an embedder.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.server.parity import LONG, MODEL, chat, complete, core

FILE = Path(__file__).parents[1] / "data" / "vllm_answers_more.json"
_POOLED = (
    *("/classify", "/pooling", "/v1/embeddings", "/invocations"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
)
Asked = tuple[str, dict[str, Any] | None]  # nothing: a GET

DEFAULTS = {
    "temperature": 0, "repetition_penalty": 1.6, "top_k": 3, "max_new_tokens": 6,
    "eos_token_id": [2, 20, 22], "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "count : nine"}], "model": MODEL}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
FLAT = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
ITEMS: list[Any] = [
    {"role": "user", "content": "count :"},
    {
        "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "nine", "annotations": []}],
    },
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ten"}]},
]  # fmt: skip


def opened(prompt: str = LONG, **more: Any) -> Asked:
    """Without what a request leaves open."""
    return "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 12, **more}


def respond(given: Any = "count : nine", **more: Any) -> Asked:
    body = {"model": MODEL, "input": given, "temperature": 0, "max_output_tokens": 8, **more}
    return "/v1/responses", body


OF_DEFAULTS: dict[str, Asked] = {
    "nothing": opened(),
    "all of it": opened(repetition_penalty=1.0, temperature=0, ignore_eos=True, min_p=0),
    "a penalty of one": opened(repetition_penalty=1.0),
    "another penalty": opened(repetition_penalty=1.1),
    "drawn cold": opened(temperature=0.0001, top_k=1),
    "others beside": opened(presence_penalty=0.5, ignore_eos=True),
    "ignoring ends": opened(ignore_eos=True),
    "other end": opened(logit_bias={"20": 100}, return_token_ids=True),
    "other end included": opened(logit_bias={"20": 100}, include_stop_str_in_output=True),
    "own end": opened(logit_bias={"2": 100}, return_token_ids=True),
    "an end ignored": opened(logit_bias={"20": 100}, ignore_eos=True, max_tokens=3),
    "an end too early": opened(logit_bias={"20": 100}, min_tokens=3, return_token_ids=True),
    "no maximum": ("/v1/completions", {"model": MODEL, "prompt": "cat", "ignore_eos": True}),
    "chat": ("/v1/chat/completions", {**CHAT, "ignore_eos": True}),
    "chat with a maximum": ("/v1/chat/completions", {**CHAT, "ignore_eos": True, "max_tokens": 9}),
    "response": ("/v1/responses", {"model": MODEL, "input": LONG, "ignore_eos": True}),
}

OF_DECODER: dict[str, Asked] = {
    # Streams.
    "streamed": complete(stream=True),
    "streamed usage": complete(stream=True, stream_options={"include_usage": True}),
    "streamed usage always": complete(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    ),
    "streamed logprobs": complete(stream=True, logprobs=1),
    "streamed echo": complete(stream=True, echo=True),
    "streamed of two": complete(["count : nine", "cat moon"], stream=True),
    "streamed stop": complete(stream=True, stop=["thirteen"], max_tokens=20),
    "streamed token ids": complete(stream=True, return_token_ids=True),
    "streamed chat": chat(stream=True),
    "streamed chat usage": chat(stream=True, stream_options={"include_usage": True}),
    "streamed chat logprobs": chat(stream=True, logprobs=True, top_logprobs=1),
    "streamed chat token ids": chat(stream=True, return_token_ids=True),
    # Neutral values.
    "nothing but names": complete(
        stop=None, seed=None, user=None, logprobs=None, logit_bias=None, min_p=None,
        truncate_prompt_tokens=None, n=1, best_of=1, suffix=None, top_k=-1, priority=0,
    ),
    "empty forms": complete(stop=[], stop_token_ids=[], bad_words=[], logit_bias={}),
    "neutral of a chat": chat(
        tool_choice="none", parallel_tool_calls=True, response_format={"type": "text"}, n=1,
        presence_penalty=0, frequency_penalty=0, logprobs=False, top_logprobs=0, user="me",
    ),
    "a seed": complete(seed=3),
    "greedy whatever else": complete(top_p=0.5, top_k=3, min_p=0.1, seed=1),
    "request id": complete(request_id="mine"),
    "metadata": chat(metadata={"a": "b"}),
    "service tier": chat(service_tier="auto"),
    # Structures and tools.
    "choice": complete(structured_outputs={"choice": ["six", "seven"]}),
    "two structures": complete(structured_outputs={"choice": ["six"], "regex": "a"}),
    "format without its schema": chat(response_format={"type": "json_schema"}),
    "tools": chat(tools=[TOOL], tool_choice="none"),
    "tools by themselves": chat(tools=[TOOL]),
    "named tool that is none": chat(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}
    ),
    "required without tools": chat(tool_choice="required"),
    "named without tools": chat(tool_choice={"type": "function", "function": {"name": "f"}}),
    # Chats.
    "max_completion_tokens": chat(max_completion_tokens=4, max_tokens=None),
    "both maxima": chat(max_completion_tokens=4, max_tokens=7),
    "no generation prompt": chat(add_generation_prompt=False),
    "special tokens added": chat(add_special_tokens=True, return_token_ids=True),
    "documents": chat(documents=[{"title": "a", "text": "b"}]),
    "chat stop": chat(stop="thirteen", max_tokens=20),
    "chat truncated": chat(LONG, truncate_prompt_tokens=5, return_token_ids=True),
    "refused by its template": (
        "/v1/chat/completions", {**CHAT, "messages": [{"role": "system", "content": "a"}]},
    ),
    "no messages": ("/v1/chat/completions", {**CHAT, "messages": []}),
    "a message without content": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user"}]}),
    "a message of no role": ("/v1/chat/completions", {**CHAT, "messages": [{"content": "a"}]}),
    "top_logprobs alone": chat(top_logprobs=2),
    "n of a chat": chat(n=2, temperature=0.0001),
    # Refused.
    "n 0": complete(n=0),
    "n below": complete(n=-1),
    "max_tokens below": complete(max_tokens=-1),
    "temperature below": complete(temperature=-1),
    "top_p above": complete(top_p=1.5),
    "stop of no text": complete(stop=[""]),
    "an empty prompt": complete(""),
    "no prompt": ("/v1/completions", {"model": MODEL}),
    "no such prompt": complete({"a": 1}),
    "tokens that are none": complete([999999]),
    "min_tokens above": complete(min_tokens=20, max_tokens=5),
    "chat logprobs above": chat(logprobs=True, top_logprobs=21),
    "suffix": complete(suffix="x"),
    "logprobs of no number": complete(logprobs="x"),
    "a stream of no truth": complete(stream="perhaps"),
    "allowed of none": complete(allowed_token_ids=[-5]),
    "truncated below": complete(truncate_prompt_tokens=-2),
    "role of nobody": (
        "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": 7}]},
    ),
    # Responses.
    "response": respond(),
    "response with instructions": respond(instructions="copy :"),
    "response to items": respond(ITEMS),
    "response that ends": respond(max_output_tokens=50),
    "response of no room": respond(max_output_tokens=60),
    "response logprobs": respond(
        include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=3
    ),
    "response of a choice": respond(structured_outputs={"choice": ["six", "seven"]}),
    "response penalties": respond(repetition_penalty=1.4, presence_penalty=0.5),
    "response bias": respond(logit_bias={"9": 100}, max_output_tokens=3),
    "response stop": respond(stop=["thirteen"], max_output_tokens=20),
    "response with tools unused": respond(tools=[FLAT], tool_choice="none"),
    "response neutral": respond(
        store=False, background=False, metadata=None, truncation="disabled", user=None, tools=[],
        text={"format": {"type": "text"}}, parallel_tool_calls=True, previous_response_id=None,
    ),
    "response of reasoning": respond(reasoning={"effort": "low"}),
    "response streamed": respond(stream=True),
    "response goes on": respond(
        [ITEMS[0], {**ITEMS[1], "status": "incomplete"}]
    ),
    "response before": respond(previous_response_id="resp_none"),
    "response in the background": respond(background=True, store=False),
    "response without input": ("/v1/responses", {"model": MODEL}),
    "response of a prompt": respond(prompt={"id": "x"}),
    "response of no model": ("/v1/responses", {"model": "none", "input": "a"}),
    "response top_logprobs above": respond(top_logprobs=21),
    "response required without tools": respond(tool_choice="required"),
    # Endpoints.
    "tokenize": ("/tokenize", {"model": MODEL, "prompt": "count : nine"}),
    "tokenize strings": (
        "/tokenize", {"model": MODEL, "prompt": "count : nine", "return_token_strs": True},
    ),
    "tokenize bare": (
        "/tokenize", {"model": MODEL, "prompt": "count : nine", "add_special_tokens": False},
    ),
    "tokenize a chat": ("/tokenize", CHAT),
    "tokenize nothing": ("/tokenize", {"model": MODEL}),
    "detokenize": ("/detokenize", {"model": MODEL, "tokens": [1, 5, 9]}),
    "detokenize nothing": ("/detokenize", {"model": MODEL}),
    "invocation": ("/invocations", complete()[1]),
    "invocation of a chat": ("/invocations", chat()[1]),
    "models": ("/v1/models", None),
    "health": ("/health", None),
    "ping": ("/ping", None),
    "version": ("/version", None),
    "load": ("/load", None),
    "tokenizer_info": ("/tokenizer_info", None),
    "no such path": ("/v1/none", None),
    "a GET of completions": ("/v1/completions", None),
    "embeddings of a decoder": ("/v1/embeddings", {"model": MODEL, "input": "a"}),
    "classes of a decoder": ("/classify", {"model": MODEL, "input": "a"}),
    "scores of a decoder": ("/score", {"model": MODEL, "text_1": "a", "text_2": "b"}),
    "a ranking of a decoder": ("/rerank", {"model": MODEL, "query": "a", "documents": ["b"]}),
    "pooling of a decoder": ("/pooling", {"model": MODEL, "input": "a"}),
}  # fmt: skip

CLASSIFIER, EMBEDDER = "classifier", "embedder"
FILMS = ["good film", "bad"]


def pool(model: str, path: str, given: Any = "good film", **more: Any) -> Asked:
    return path, {"model": model, "input": given, **more}


OF_CLASSIFIER: dict[str, Asked] = {
    "class": pool(CLASSIFIER, "/classify"),
    "classes": pool(CLASSIFIER, "/classify", FILMS),
    "logits": pool(CLASSIFIER, "/classify", use_activation=False),
    "bare": pool(CLASSIFIER, "/classify", add_special_tokens=False),
    "truncated": pool(CLASSIFIER, "/classify", "good bad film a dull", truncate_prompt_tokens=3),
    "of tokens": pool(CLASSIFIER, "/classify", [5, 6, 7]),
    "of several lists of tokens": pool(CLASSIFIER, "/classify", [[5, 6, 7], [8]]),
    "of no text": pool(CLASSIFIER, "/classify", []),
    "too long": pool(CLASSIFIER, "/classify", "good " * 60),
    "pooled": pool(CLASSIFIER, "/pooling", task="classify"),
    "pooled as logits": pool(CLASSIFIER, "/pooling", task="classify", use_activation=False),
    "pooled by its own": pool(CLASSIFIER, "/pooling", FILMS),
    "its embedding": pool(CLASSIFIER, "/v1/embeddings"),
    "its completion": ("/v1/completions", {"model": CLASSIFIER, "prompt": "a"}),
    "its score": ("/score", {"model": CLASSIFIER, "text_1": "good", "text_2": "bad"}),
    "its invocation": ("/invocations", {"model": CLASSIFIER, "input": "good film"}),
}
OF_EMBEDDER: dict[str, Asked] = {
    "embedding": pool(EMBEDDER, "/v1/embeddings"),
    "embeddings": pool(EMBEDDER, "/v1/embeddings", FILMS),
    "embedding of tokens": pool(EMBEDDER, "/v1/embeddings", [5, 6, 7]),
    "embedding in base64": pool(EMBEDDER, "/v1/embeddings", encoding_format="base64"),
    "embedding of length one": pool(EMBEDDER, "/v1/embeddings", use_activation=True),
    "embedding as it is": pool(EMBEDDER, "/v1/embeddings", use_activation=False),
    "some dimensions": pool(EMBEDDER, "/v1/embeddings", dimensions=5),
    "too many dimensions": pool(EMBEDDER, "/v1/embeddings", dimensions=5000),
    "in no format": pool(EMBEDDER, "/v1/embeddings", encoding_format="none"),
    "too long": pool(EMBEDDER, "/v1/embeddings", "good " * 60),
    "pooled": pool(EMBEDDER, "/pooling", task="embed"),
    "pooled by tokens": pool(EMBEDDER, "/pooling", task="token_embed"),
    "pooled by its own": pool(EMBEDDER, "/pooling"),
    "pooled as classes": pool(EMBEDDER, "/pooling", task="classify"),
    "score": ("/score", {"model": EMBEDDER, "text_1": "good", "text_2": FILMS}),
    "score of pairs": ("/v1/score", {"model": EMBEDDER, "queries": FILMS, "documents": FILMS}),
    "score of others": ("/score", {"model": EMBEDDER, "text_1": FILMS, "text_2": ["a"]}),
    "ranking": ("/rerank", {"model": EMBEDDER, "query": "good", "documents": FILMS}),
    "the first": (
        "/v1/rerank", {"model": EMBEDDER, "query": "bad", "documents": FILMS, "top_n": 1},
    ),
    "ranking of nothing": ("/v2/rerank", {"model": EMBEDDER, "query": "bad", "documents": []}),
    "its class": pool(EMBEDDER, "/classify"),
    "its invocation": ("/invocations", {"model": EMBEDDER, "input": "good film"}),
}  # fmt: skip

GROUPS: dict[str, dict[str, Asked]] = {
    "decoder": OF_DECODER,
    "defaults": OF_DEFAULTS,
    "classifier": OF_CLASSIFIER,
    "embedder": OF_EMBEDDER,
}


def shape(value: Any) -> Any:
    """Names and types, of a list those of its first; nothing of what is null."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in sorted(value.items()) if v not in (None, [], {})}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


def unlike(theirs: Any, ours: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The names of `theirs` that are not in `ours`, those that are in ours alone, and those of
    another type, each with where it lies."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted({*theirs, *ours}):
            inner = f"{place}.{name}"
            if name not in ours or name not in theirs:
                yield inner, "vLLM" if name in theirs else "here"
            else:
                yield from unlike(theirs[name], ours[name], inner)
    elif isinstance(theirs, list) and isinstance(ours, list) and theirs and ours:
        yield from unlike(theirs[0], ours[0], place)
    elif type(theirs) is not type(ours) or (isinstance(theirs, str) and theirs != ours):
        yield place, "type"


def told(path: str, status: int, kind: str, text: str) -> dict[str, Any]:
    """What is compared of an answer: its status; of a success its shape, and what it says."""
    if status != 200:
        return {"status": status}
    if kind.startswith("text/event-stream"):
        parts = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        events = [json.loads(part) for part in parts if part != "[DONE]"]
        return {"status": 200, "ends": parts[-1] == "[DONE]", **_streamed(events)}
    if not kind.startswith("application/json") or not text:
        return {"status": 200}
    answer = json.loads(text)
    found = {"status": 200, "shape": shape(answer)}
    if path.endswith("completions") or (path == "/invocations" and "choices" in answer):
        found |= core(status, answer)
    elif path == "/v1/responses":
        found |= _response(answer)
    elif path in ("/tokenize", "/detokenize"):
        found["answer"] = {name: value for name, value in answer.items() if value is not None}
    elif path in _POOLED:
        found["answer"] = [_numbers(each) for each in answer.get("data") or answer["results"]]
    if isinstance(answer.get("usage"), dict) and "prompt_tokens" in answer["usage"]:
        found["prompt_tokens"] = answer["usage"]["prompt_tokens"]
    return found


def _numbers(told: dict[str, Any]) -> dict[str, Any]:
    """An embedding as numbers, whatever it is sent as; of a document its text alone."""
    packed, document = told.get("embedding"), told.get("document")
    if isinstance(packed, str):
        return {**told, "embedding": np.frombuffer(base64.b64decode(packed), "<f4").tolist()}
    return {**told, "document": document["text"]} if document else told


def _streamed(events: list[Any]) -> dict[str, Any]:
    if "type" in events[0]:
        types = [event["type"] for event in events]
        deltas = [event["delta"] for event in events if "delta" in event]
        kinds = list(dict.fromkeys(types))
        return {"events": kinds, "text": "".join(deltas), **_response(events[-1]["response"])}
    texts: dict[str, str] = {}
    reasons: dict[str, Any] = {}
    for event in events:
        for choice in event["choices"]:
            index = str(choice["index"])
            piece = choice.get("text", choice.get("delta", {}).get("content")) or ""
            texts[index] = texts.get(index, "") + piece
            reasons[index] = choice["finish_reason"]
    usage = [event.get("usage") for event in events]
    used = {name: value for name, value in (usage[-1] or {}).items() if name.endswith("_tokens")}
    every = sum(each is not None for each in usage) == len(usage)
    return {"texts": texts, "reasons": reasons, "usage": used, "always": every}


def _response(answer: dict[str, Any]) -> dict[str, Any]:
    said = []
    for item in answer["output"]:
        if item["type"] == "message":
            for part in item["content"]:
                told = part.get("logprobs") or ()
                logprobs = [[each["token"], each["logprob"]] for each in told]
                said.append([item["type"], part["text"], logprobs])
        else:
            said.append([item["type"], item.get("name"), item.get("arguments")])
    names = ("input_tokens", "output_tokens", "total_tokens")
    return {
        "answer": answer["status"], "why": answer["incomplete_details"], "said": said,
        "used": {name: answer["usage"][name] for name in names},
    }  # fmt: skip


def answers() -> dict[str, dict[str, Any]]:
    return dict(json.loads(FILE.read_text())) if FILE.exists() else {}
