"""The answers of `/v1/responses`: items of output, whole or as they grow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from dora_serve.onnxruntime.sampling import Sampling

from .answers import TokenLogprob
from .pieces import Json
from .responses import ResponsesRequest

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Json]
    logprobs: list[TokenLogprob]


class OutputMessage(BaseModel):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """`arguments`: JSON as text."""

    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class ReplyUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Reply(BaseModel):
    """Of `/v1/responses`. What the request said is told again."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Status
    output: list[OutputMessage | OutputCall]
    usage: ReplyUsage | None
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    metadata: dict[str, str] | None
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    tool_choice: Any
    tools: list[Json]
    max_output_tokens: int
    previous_response_id: None
    reasoning: Json | None
    text: Json
    top_logprobs: int
    truncation: str
    background: Literal[False]
    store: Literal[False]
    service_tier: Literal["default"]
    user: str | None


def usage(prompt: int, completion: int, cached: int) -> Json:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


def reply(body: ResponsesRequest, model: str, draw: Sampling) -> Json:
    """A `Reply` to `body` before anything is written."""
    shown = {"tool_choice", "tools", "reasoning", "text"}
    told = body.model_dump(include=shown, exclude_none=True, by_alias=True)
    return {
        "id": body.request_id or f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": "in_progress",
        "output": [],
        "usage": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "temperature": draw.temperature,
        "top_p": draw.top_p,
        "presence_penalty": draw.presence_penalty,
        "frequency_penalty": draw.frequency_penalty,
        "tool_choice": told["tool_choice"] if body.tools else "none",
        "tools": told.get("tools", []),
        "max_output_tokens": draw.max_tokens,
        "previous_response_id": None,
        "reasoning": told.get("reasoning"),
        "text": told.get("text") or {"format": {"type": "text"}},
        "top_logprobs": body.top_logprobs,
        "truncation": body.truncation,
        "background": False,
        "store": False,
        "service_tier": "default",
        "user": body.user,
    }


class Output:
    """The items of an answer as chats' deltas make them grow, and the events that tell of it.
    `reason`: why it ended."""

    def __init__(self) -> None:
        self.items: list[Json] = []
        self.reason: str | None = None
        self._open = False  # the last one grows
        self._untold: list[Json] = []  # log-probabilities of tokens whose text is not certain yet

    def add(self, told: Json) -> Iterator[Json]:
        """Let the items grow by what a choice of a chat that is streamed grew by."""
        delta, self.reason = told["delta"], told["finish_reason"] or self.reason
        self._untold += (told["logprobs"] or {}).get("content") or []
        if text := delta.get("content"):
            yield from self._write(text)
        for call in delta.get("tool_calls") or ():
            yield from self._call(call)

    def end(self, status: Status) -> Iterator[Json]:
        """Close the last item."""
        if not self._open:
            return
        if self._untold and self.items[-1]["type"] == "message":
            yield from self._write("")  # of the end, which has no text
        self._open, item = False, self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("output_text.done", content_index=0, **said)
            yield self._event("content_part.done", content_index=0, part=part)
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("function_call_arguments.done", **said)
        yield self._event("output_item.done", whole=True, item=item)

    def _begin(self, item: Json) -> Iterator[Json]:
        yield from self.end("completed")
        self.items.append(item)
        self._open = True
        yield self._event("output_item.added", whole=True, item={**item})

    def _write(self, text: str) -> Iterator[Json]:
        if not self._open or self.items[-1]["type"] != "message":
            yield from self._begin(
                {
                    "type": "message",
                    "id": f"msg_{uuid.uuid4().hex}",
                    "status": "in_progress",
                    "role": "assistant",
                    "content": [],
                }
            )
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event("content_part.added", content_index=0, part={**part, "logprobs": []})
            self.items[-1]["content"] = [part]
        (part,) = self.items[-1]["content"]
        logprobs, self._untold = self._untold, []
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _call(self, call: Json) -> Iterator[Json]:
        self._untold.clear()  # of a call none are told, nor with the text before it
        function = call["function"]
        if "id" in call:
            yield from self._begin(
                {
                    "type": "function_call",
                    "id": f"fc_{uuid.uuid4().hex}",
                    "status": "in_progress",
                    "call_id": call["id"],
                    "name": function["name"],
                    "arguments": "",
                }
            )
        if piece := function.get("arguments"):
            self.items[-1]["arguments"] += piece
            yield self._event("function_call_arguments.delta", delta=piece)

    def _event(self, kind: str, whole: bool = False, **said: Any) -> Json:
        own = {} if whole else {"item_id": self.items[-1]["id"]}
        place = {"output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **own, **place, **said}
