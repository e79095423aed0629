"""Tools are called as the request says, found in what models write, whole and streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from dora_serve.server.options import ServerOptions
from dora_serve.server.wire.responses import ResponsesRequest
from dora_serve.server.wire.structure import asked_json
from dora_serve.server.wire.tools import Tool, schema_of_calls
from tests.server.conftest import started
from tests.server.test_structure import MODEL, follows, save_bytes_model

PART = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Köln"]}, "how": {"$ref": "#/$defs/part"}},
    "required": ["city", "how"],
    "additionalProperties": False,
    "$defs": {"part": {**PART, "additionalProperties": False}},
}
NOTHING: Any = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "d", "parameters": NOTHING}},
]
SCHEMAS = {"weather": WEATHER, "now": NOTHING}
TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    root = tmp_path_factory.mktemp("tools")
    save_bytes_model(root / "models" / MODEL)
    (root / "models" / MODEL / "chat_template.jinja").write_text(TEMPLATE)
    options = ServerOptions(threads=1)
    with started(root / "models", root, None, options) as running, running.openai as found:
        yield found


def ask(client: openai.OpenAI, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": "which?"}]
    options: Any = {"model": MODEL, "messages": messages, "max_tokens": 400, "seed": 3, **more}
    return client.chat.completions.create(**options)


def check(calls: Any) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert call.type == "function"
    assert len({call.id for call in calls}) == len(calls) > 0


@pytest.mark.parametrize("seed", range(4))
def test_required(client: openai.OpenAI, seed: int) -> None:
    one = {"parallel_tool_calls": False}
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", seed=seed, **one).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    check(choice.message.tool_calls)
    assert len(choice.message.tool_calls) == 1


def _one(a: Any, **more: Any) -> Any:
    """An object with the one property `a`."""
    shape = {"type": "object", "required": ["a"], "additionalProperties": False}
    return {**shape, "properties": {"a": a}, **more}


def _tools(*schemas: Any) -> list[Tool]:
    return [
        Tool.model_validate({"function": {"name": f"f{i}", "parameters": schema}})
        for i, schema in enumerate(schemas)
    ]


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (_one({"type": "array", "items": {"$ref": "#"}}), {"a": [{"a": []}]}, {"a": [[]]}),
        (_one({"$ref": "#/$defs/p"}, **{"$defs": {"p": {"const": 1}}}), {"a": 1}, {"a": 2}),
        (_one({"$ref": "#/definitions/p"}, definitions={"p": {"const": 1}}), {"a": 1}, {"a": 3}),
        (_one(_one({"const": 1}), required=[]), {"a": {"a": 1}}, {"a": 1}),
        (_one({"anyOf": [{"const": 1}, _one({"$ref": "#/properties/a/anyOf/0"})]}),
         {"a": {"a": 1}}, {"a": {"a": 2}}),
        (_one({"$ref": "#/$defs/p"}, **{"$id": "http://x/y", "$defs": {"p": {"const": 1}}}),
         {"a": 1}, {"a": 2}),
        (_one({"const": {"$ref": "#"}}), {"a": {"$ref": "#"}}, {"a": {"$ref": "#/$defs/0"}}),
    ],
)  # fmt: skip
def test_what_a_schema_says_of_its_own_parts(schema: Any, right: Any, wrong: Any) -> None:
    """As zod, pydantic and others write it, beside a tool with a definition of the same name."""
    other = _one({"$ref": "#/$defs/p"}, **{"$defs": {"p": {"const": 2}}})
    told = asked_json(schema_of_calls(_tools(schema, other), "required", True))
    calls = [[{"name": "f0", "parameters": each}] for each in (right, wrong)]
    assert [follows(told, json.dumps(each)) for each in calls] == [True, False]
    assert follows(told, '[{"name": "f1", "parameters": {"a": 2}}]')


@pytest.mark.parametrize("name", SCHEMAS)
def test_named(client: openai.OpenAI, name: str) -> None:
    wanted = {"type": "function", "function": {"name": name}}
    (choice,) = ask(client, tools=TOOLS, tool_choice=wanted).choices
    assert choice.finish_reason == "stop"  # as in vLLM
    check(choice.message.tool_calls)
    assert [call.function.name for call in choice.message.tool_calls] == [name]


@pytest.mark.parametrize(
    "wanted", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_streamed_calls_are_the_whole(client: openai.OpenAI, wanted: Any) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": wanted, "temperature": 0}
    options["parallel_tool_calls"] = False
    (whole,) = ask(client, **options).choices
    name, arguments, reason = "", "", None
    for piece in ask(client, stream=True, **options):
        (choice,) = piece.choices
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    (call,) = whole.message.tool_calls
    assert (name, arguments, reason) == (
        call.function.name,
        call.function.arguments,
        whole.finish_reason,
    )


@pytest.mark.parametrize("several", [True, False])
def test_one_call_where_several_are_not_wanted(client: openai.OpenAI, several: bool) -> None:
    """Of two that the model writes, though nothing says that it has to call."""
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    told: Any = {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": several}
    told["extra_body"] = {"structured_outputs": {"choice": [call + call]}}
    (whole,) = ask(client, **told).choices
    assert [each.function.name for each in whole.message.tool_calls] == ["now"] * (1 + several)
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    pieces = [piece.choices[0].delta for piece in ask(client, stream=True, **told)]
    assert sum(len(piece.tool_calls or ()) for piece in pieces) == 1 + several


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_text_stays_text(client: openai.OpenAI, choice: str) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 20}
    (told,) = ask(client, **options).choices
    assert told.message.tool_calls is None
    pieces = list(ask(client, stream=True, **options))
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert streamed == told.message.content != ""


def test_the_template_sees_tools_and_calls(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    turns: Any = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    more: Any = {"extra_body": {"return_token_ids": True}, "max_tokens": 1}
    answer = ask(client, messages=turns, tools=TOOLS, tool_choice="none", **more)
    ids = answer.model_extra["prompt_token_ids"]
    counted: Any = {"model": MODEL, "messages": turns, "tools": TOOLS}
    tokens: Any = client.post("/../tokenize", body=counted, cast_to=object)
    assert tokens["tokens"] == ids
    body = {"model": MODEL, "tokens": ids}
    told: Any = client.post("/../detokenize", body=body, cast_to=object)
    assert told["prompt"] == '<s>weather now user uassistant now {"a": 1}tool noon'


@pytest.mark.parametrize("said", [{"description": ""}, {"description": "d"}, {}])
def test_a_tool_is_described_as_it_was_said(said: dict[str, str]) -> None:
    """Frameworks tell of a function without words that it has none, and templates print that."""
    function = {"name": "now", **said, "parameters": NOTHING}
    tool = Tool.model_validate({"type": "function", "function": function})
    assert tool.model_dump(exclude_none=True)["function"] == function
    asked = ResponsesRequest.model_validate(
        {"model": "m", "input": "i", "tools": [{"type": "function", **function}]}
    )
    assert asked.tools and asked.tools[0].model_dump(exclude_none=True).items() >= said.items()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "none"}}}, "there is no tool"),
        ({"tools": [{"type": "function", "function": {}}]}, "name"),
        (
            {
                "tools": [{"function": {"name": "f", "parameters": {"type": "foo"}}}],
                "tool_choice": "required",
            },
            "foo",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": "required",
                "extra_body": {"structured_outputs": {"choice": ["a"]}},
            },
            "structured_outputs",
        ),
    ],
)
def test_what_is_wrong(client: openai.OpenAI, given: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, **given)


def test_tags_that_are_special_tokens(tmp_path: Path) -> None:
    """As fine-tunes add them, whose text other answers leave out; others stay left out."""
    base = tmp_path / "models" / MODEL
    save_bytes_model(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    call = '{"name": "now", "arguments": {}}'
    tokenizer.add_tokens(["Well.", call])
    special: Any = {"additional_special_tokens": ["<tool_call>", "</tool_call>", "<end>"]}
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(base)
    said = f"gWell.<end><tool_call>{call}</tool_call>"
    path = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    states = torch.randn(len(tokenizer), 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # what comes next hangs on the last token alone
        for tensor in model.parameters():
            tensor.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(states)
        model.lm_head.weight[path[1:]] = states[path[:-1]]
    model.save_pretrained(base)
    options = ServerOptions(threads=1)
    with started(base.parent, tmp_path, None, options) as running, running.openai as client:
        turns: Any = [{"role": "user", "content": "g"}]
        told: Any = {"messages": turns, "tools": TOOLS, "temperature": 0}
        (whole,) = ask(client, **told).choices
        deltas = [piece.choices[0].delta for piece in ask(client, stream=True, **told)]
        (bare,) = ask(client, **{**told, "tools": openai.omit}).choices
    (found,) = whole.message.tool_calls
    assert (whole.message.content, whole.finish_reason) == ("Well.", "tool_calls")
    assert (found.function.name, found.function.arguments) == ("now", "{}")
    assert re.fullmatch("[a-zA-Z0-9]{9}", found.id)  # what Mistral's templates take back
    assert "".join(delta.content or "" for delta in deltas) == "Well."
    assert [each.function.name for delta in deltas for each in delta.tool_calls or ()] == ["now"]
    assert bare.message.content == f"Well.{call}"
