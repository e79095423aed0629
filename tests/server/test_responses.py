"""`/v1/responses` as OpenAI's own client reads it: whole, in events, as objects, with tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from dora_serve.server.options import ServerOptions
from dora_serve.server.wire.responses import ResponsesRequest
from tests.server.conftest import started
from tests.server.test_structure import MODEL, save_bytes_model

TOOL: Any = {
    "type": "function", "name": "turn", "description": "d", "strict": True,
    "parameters": {
        "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
        "additionalProperties": False,
    },
}  # fmt: skip
OTHER: Any = {**TOOL, "name": "stop"}
OPTIONS: Any = {"model": MODEL, "temperature": 0}


class Light(BaseModel):
    on: bool


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    root = tmp_path_factory.mktemp("responses")
    save_bytes_model(root / "models" / MODEL)
    options = ServerOptions(threads=1)
    with started(root / "models", root, None, options) as running, running.openai as found:
        yield found


def chat_text(client: openai.OpenAI, messages: Any, count: int) -> str | None:
    done = client.chat.completions.create(**OPTIONS, messages=messages, max_tokens=count)
    text: str | None = done.choices[0].message.content
    return text


def test_the_answer_of_a_chat(client: openai.OpenAI) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Hello"},
    ]
    done = client.responses.create(
        **OPTIONS, instructions="be brief", input="Hello", max_output_tokens=9, store=False
    )
    assert done.output_text == chat_text(client, turns, 9) != ""
    assert (done.status, done.object) == ("incomplete", "response")
    assert done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.usage is not None
    assert (done.usage.output_tokens, done.max_output_tokens) == (9, 9)
    assert done.usage.total_tokens == done.usage.input_tokens + 9
    back: Any = [{"role": "user", "content": "Hello"}, *done.output, turns[1]]
    again = client.responses.create(**OPTIONS, input=back, max_output_tokens=9)
    said = [turns[1], {"role": "assistant", "content": done.output_text}, turns[1]]
    assert again.output_text == chat_text(client, said, 9)


def test_a_stream_is_the_whole(client: openai.OpenAI) -> None:
    asked: Any = {**OPTIONS, "input": "Hello", "max_output_tokens": 12}
    whole = client.responses.create(**asked, include=["message.output_text.logprobs"])
    kinds: list[str] = []
    pieces: list[str] = []
    with client.responses.stream(**asked) as events:
        for number, event in enumerate(events):
            kinds.append(event.type)
            assert event.sequence_number == number
            if event.type == "response.output_text.delta":
                pieces.append(event.delta)
        final = events.get_final_response()
    assert "".join(pieces) == final.output_text == whole.output_text
    assert list(dict.fromkeys(kinds)) == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert final.usage == whole.usage
    assert final.status == "incomplete"
    (message,) = whole.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == 12


def test_the_log_probabilities_of_a_stream_are_the_whole(client: openai.OpenAI) -> None:
    """Those of tokens whose text comes later, parts of a character, and of the end, too."""
    asked: Any = {**OPTIONS, "input": "Hello", "max_output_tokens": 12, "top_logprobs": 2,
                  "include": ["message.output_text.logprobs"]}  # fmt: skip
    ended: Any = {"structured_outputs": {"regex": "abcab"}}
    apart = 0
    for more in ({}, {"temperature": 1, "extra_body": {"seed": 2}}, {"extra_body": ended}):
        (message,) = client.responses.create(**{**asked, **more}).output
        assert message.type == "message"
        truth = [(each.token, each.logprob) for each in message.content[0].logprobs]
        told: list[tuple[str, float]] = []
        for event in client.responses.create(**{**asked, **more}, stream=True):
            if event.type == "response.output_text.delta":
                told += [(each.token, each.logprob) for each in event.logprobs]
                apart += len(event.logprobs) != 1 or not event.delta
            if event.type == "response.output_text.done":
                done = [(each.token, each.logprob) for each in event.logprobs]
        assert len(truth) > 1
        assert done == told
        assert [token for token, _ in told] == [token for token, _ in truth]
        values = [value for _, value in truth]
        assert [value for _, value in told] == pytest.approx(values, abs=1e-4)
    assert apart


@pytest.mark.parametrize("text", ["{call}Well.", "Well.{call} ", "a{call}b{call} ", "{call}"])
def test_items_of_text_and_calls(client: openai.OpenAI, text: str) -> None:
    """In the order in which they are written, with the log-probabilities of each text alone:
    streamed, or whole, where all of the text came first, with those of the calls' tokens too."""
    said = text.format(call='<tool_call>{"name": "turn", "arguments": {}}</tool_call>')
    asked: Any = {**OPTIONS, "input": "Hello", "max_output_tokens": 500, "tools": [TOOL],
                  "include": ["message.output_text.logprobs"],
                  "extra_body": {"structured_outputs": {"choice": [said]}}}  # fmt: skip

    def items(output: Any) -> list[tuple[str, int]]:
        told = [item.content[0] for item in output if item.type == "message"]
        texts = iter([(part.text, len(part.logprobs)) for part in told])
        return [next(texts) if each.type == "message" else (each.name, 0) for each in output]

    for event in client.responses.create(**asked, stream=True):
        if event.type == "response.completed":
            streamed = items(event.response.output)
    whole = items(client.responses.create(**asked).output)
    assert whole == streamed
    assert [text for text, _ in whole] == [
        part for part in text.replace("{call}", "|turn|").split("|") if part.strip()
    ]
    assert all(count <= len(text) + 1 for text, count in whole)  # with the end


def test_what_is_too_long_loses_its_begin_as_far_as_the_answer_needs(client: openai.OpenAI) -> None:
    asked: Any = {**OPTIONS, "input": "Hello" * 400, "max_output_tokens": 60}
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.responses.create(**asked)
    done = client.responses.create(**asked, truncation="auto", extra_body={"ignore_eos": True})
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens) == (540, 60)  # of 600
    told = client.completions.create(
        **OPTIONS, prompt="Hello" * 400, max_tokens=60, extra_body={"truncate_prompt_tokens": -1}
    )
    assert told.usage is not None
    assert told.usage.prompt_tokens == 540
    for most in (600, 601):  # nothing of a prompt would be left
        with pytest.raises(openai.BadRequestError, match="context length"):
            client.responses.create(**{**asked, "max_output_tokens": most}, truncation="auto")


def test_an_object(client: openai.OpenAI) -> None:
    asked: Any = {**OPTIONS, "input": "Hello", "max_output_tokens": 500, "text_format": Light}
    parsed = client.responses.parse(**asked).output_parsed
    assert isinstance(parsed, Light)
    with client.responses.stream(**asked) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_parsed == parsed
    loose = client.responses.create(
        **OPTIONS, input="Hello", max_output_tokens=500, text={"format": {"type": "json_object"}}
    )
    assert loose.output_text.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "turn"}])
def test_calls_of_functions(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {
        **OPTIONS, "input": "Hello", "max_output_tokens": 500, "tools": [TOOL],
        "tool_choice": choice, "parallel_tool_calls": False,
    }  # fmt: skip
    (call,) = client.responses.create(**asked).output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments).keys()) == ("turn", {"on"})
    deltas = ""
    with client.responses.stream(**asked) as events:
        for event in events:
            if event.type == "response.function_call_arguments.delta":
                deltas += event.delta
        (streamed,) = events.get_final_response().output
    assert streamed.type == "function_call"
    assert deltas == streamed.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    turns: Any = [{"role": "user", "content": "Hello"}, call, result]
    last = client.responses.create(**OPTIONS, input=turns, max_output_tokens=5, tools=[TOOL])
    said = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "turn", "arguments": "{}"}},
        ]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]  # fmt: skip
    assert last.output_text == chat_text(client, said, 5)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "type"),
        ({"input": [{"type": [1]}]}, "type"),
        ({"input": [{"type": {"a": 1}}]}, "type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "type"),
        ({"tool_choice": {"type": "function", "name": "none"}, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [TOOL, OTHER], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"top_k": -2}, "top_k"),
        ({"max_output_tokens": 5000}, "max_tokens"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, more: dict[str, Any], named: str) -> None:
    body = {"model": MODEL, "input": "Hello", "max_output_tokens": 5, **more}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body=body, cast_to=object)
    assert named in str(caught.value.param)


def test_nothing_is_kept(client: openai.OpenAI) -> None:
    done = client.responses.create(**OPTIONS, input="Hello", max_output_tokens=5, store=True)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(done.id)


def test_all_of_a_thought_is_handed_back() -> None:
    parts = [{"type": "summary_text", "text": text} for text in ("first", "second")]
    thought = {"type": "reasoning", "summary": parts}
    turns = [{"role": "user", "content": "q"}, thought, {"role": "user", "content": "r"}]
    asked = ResponsesRequest.model_validate({"model": MODEL, "input": turns})
    assert [each.reasoning for each in asked.chat.messages] == [None, "first\nsecond", None]
