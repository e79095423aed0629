"""Null, the default and the empty form of every parameter of vLLM are no use of it; what is used
and not served is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from dora_serve.server.bounded.work import BODIES, fault, read_body
from dora_serve.server.wire import requests
from dora_serve.server.wire.parameters import NO_EFFECT, NOT_SERVED, is_neutral
from tests.server.conftest import BASE, DOWN, EMBEDS, SENTIMENT, Server

FILE = Path(__file__).parents[1] / "data" / "vllm_parameters.json"
PARAMETERS: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
ASKED: Any = [{"role": "user", "content": "count : nine"}]
# vLLM's request: ours, its path, and the least that can be asked.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CompletionRequest": (
        "CompletionRequest",
        "/v1/completions",
        {"model": DOWN, "prompt": "count : nine"},
    ),
    "ChatCompletionRequest": (
        "ChatRequest",
        "/v1/chat/completions",
        {"model": DOWN, "messages": ASKED},
    ),
    "EmbeddingCompletionRequest": (
        "EmbeddingRequest",
        "/v1/embeddings",
        {"model": EMBEDS, "input": "bad"},
    ),
    "ClassificationCompletionRequest": (
        "ClassifyRequest",
        "/classify",
        {"model": SENTIMENT, "input": "bad"},
    ),
    "TokenizeCompletionRequest": (
        "TokenizeRequest",
        "/tokenize",
        {"model": BASE, "prompt": "cat"},
    ),
    "TokenizeChatRequest": ("TokenizeRequest", "/tokenize", {"model": BASE, "messages": ASKED}),
    "DetokenizeRequest": ("DetokenizeRequest", "/detokenize", {"model": BASE, "tokens": [5]}),
}
EMPTY: list[Any] = [None, [], {}, ""]


def read(kind: str, body: dict[str, Any]) -> Any:
    return read_body(BODIES[KINDS[kind][0]], json.dumps(body).encode())


def known(kind: str) -> set[str]:
    ours = BODIES[KINDS[kind][0]].model_fields
    return {*ours, *NO_EFFECT, *NOT_SERVED}


def dump(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """What is read; of what depends on another, null is the default."""
    found: dict[str, Any] = read(kind, body).model_dump()
    if found.get("tools", 0) is None and found.get("tool_choice") == "none":
        found["tool_choice"] = None  # without tools they are the same
    if found.get("add_special_tokens", 0) is None:
        found["add_special_tokens"] = PARAMETERS[kind]["add_special_tokens"]
    return found


def optional(kind: str) -> list[str]:
    return [name for name in PARAMETERS[kind] if name not in KINDS[kind][2]]


def test_every_request_of_vllm_is_here() -> None:
    assert PARAMETERS.keys() == KINDS.keys()
    for kind, names in PARAMETERS.items():
        assert set(names) <= known(kind), set(names) - known(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_use_of_a_parameter(kind: str) -> None:
    plain = KINDS[kind][2]
    bare = dump(kind, plain)
    count = 0
    for name in optional(kind):
        for value in [*EMPTY, PARAMETERS[kind][name]]:
            assert dump(kind, {**plain, name: value}) == bare, name
            count += 1
    assert count == 5 * len(optional(kind))
    assert count >= (5 if kind != "DetokenizeRequest" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["null", "default", "empty"])
def test_all_of_them_at_once(server: Server, kind: str, form: str) -> None:
    _, path, plain = KINDS[kind]
    greedy = {"temperature": 0} if "Completion" in kind and path.startswith("/v1/c") else {}
    defaults = PARAMETERS[kind]
    forms = {
        "null": dict.fromkeys(defaults),
        "default": defaults,
        "empty": {name: [] for name in defaults},
    }
    more = {name: forms[form][name] for name in optional(kind)}
    with server.http as http:
        bare = http.post(path, json={**plain, **greedy})
        full = http.post(path, json={**plain, **more, **greedy})
    assert bare.status_code == full.status_code == 200, full.text
    told = [each.json() for each in (bare, full)]
    for each in told:
        each.pop("id", None)
        each.pop("created", None)
    assert told[0] == told[1]


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_used_and_not_served(server: Server, name: str) -> None:
    value = next(each for each in ("x", True, 7) if not is_neutral(name, each))
    taken = name in requests.CompletionRequest.model_fields
    _, path, plain = KINDS["ChatCompletionRequest" if taken else "CompletionRequest"]
    with server.http as http:
        answer = http.post(path, json={**plain, name: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert error["message"] == f"{name}: not served: {NOT_SERVED[name][0]}"


def test_numbers_and_truth_are_not_the_same() -> None:
    assert is_neutral("priority", 0)
    assert not is_neutral("priority", False)
    assert is_neutral("echo", False)
    assert not is_neutral("echo", 0)


@pytest.mark.parametrize("dumped", [True, False])
def test_a_message_that_is_handed_back(server: Server, dumped: bool) -> None:
    with server.openai as client:
        options: Any = {"model": DOWN, "temperature": 0, "max_tokens": 3}
        first = client.chat.completions.create(**options, messages=ASKED).choices[0].message
        back: Any = first.model_dump() if dumped else first
        turns: Any = [*ASKED, back, {"role": "user", "content": "more"}]
        again = client.chat.completions.create(**options, messages=turns)
        assert again.choices[0].message.content
        plain: Any = [*ASKED, {"role": "assistant", "content": first.content}, turns[-1]]
        expected = client.chat.completions.create(**options, messages=plain)
    assert again.choices[0].message.content == expected.choices[0].message.content


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "a", "refusal": None, "annotations": [], "tool_calls": []},
        {"content": "a", "refusal": None, "audio": None, "function_call": None, "tool_calls": None},
        {"content": [{"type": "text", "text": "a"}], "annotations": None},
        {"content": "a", "reasoning": None, "reasoning_content": None, "name": None},
        {"content": "a", "provider_specific_fields": {"refusal": None}, "images": []},
    ],
)
def test_messages_that_mean_the_same(turn: dict[str, Any]) -> None:
    body = {"model": BASE, "messages": [{"role": "assistant", **turn}]}
    (message,) = read("ChatCompletionRequest", body).messages
    assert message.plain() == {"role": "assistant", "content": "a"}


def test_an_answer_that_calls_tools_and_what_they_said() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    first, second = read("ChatCompletionRequest", {"model": BASE, "messages": turns}).messages
    assert first.plain() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call],  # whose arguments are read where a template takes them
    }
    assert second.plain() == {"role": "tool", "content": "3", "tool_call_id": "1"}


def test_a_request_may_have_an_id_and_usage_in_every_event(server: Server) -> None:
    with server.openai as client:
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        pieces = list(
            client.completions.create(
                model=DOWN,
                prompt=["count : nine", "count : five"],
                temperature=0,
                max_tokens=4,
                stream=True,
                stream_options=options,
                extra_body={"request_id": "mine"},
            )
        )
    assert {piece.id for piece in pieces} == {"cmpl-mine"}
    for index in (0, 1):
        used = [
            piece.usage for piece in pieces if piece.choices and piece.choices[0].index == index
        ]
        assert [each.completion_tokens for each in used if each] == [1, 2, 3, 4]
    last = pieces[-1].usage
    assert last is not None
    assert last.completion_tokens == 8


def test_what_no_client_may_say(server: Server) -> None:
    with server.openai as client, pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model=DOWN, prompt="cat", best_of=3)


@pytest.mark.parametrize("name", ["metadata", "logit_bias", "documents"])
def test_an_object_of_too_many_names_is_one_error(name: str) -> None:
    """And not one for each of them, which would take seconds and hundreds of megabytes."""
    many: Any = {f"k{i}": {} for i in range(2000)}
    body = {"model": BASE, "messages": ASKED, name: [many] if name == "documents" else many}
    with pytest.raises(ValueError, match="names") as caught:
        read("ChatCompletionRequest", body)
    assert caught.value.error_count() == 1  # type: ignore[attr-defined]


def test_marks_for_other_caches_change_nothing() -> None:
    """Clients that also speak to Anthropic put them on parts and tools."""
    mark = {"cache_control": {"type": "ephemeral"}}
    part, tool = {"type": "text", "text": "one"}, {"function": {"name": "f"}}
    bodies = [
        {"messages": [{"role": "user", "content": [{**part, **more}]}], "tools": [{**tool, **more}]}
        for more in ({}, mark)
    ]
    plain, marked = (read("ChatCompletionRequest", {"model": BASE, **body}) for body in bodies)
    assert plain == marked


@pytest.mark.parametrize(
    ("kind", "body", "place", "says"),
    [
        ("CompletionRequest", {"prompt": [-1]}, ["prompt", "0"], "greater than or equal to 0"),
        ("CompletionRequest", {"prompt": ["a", 1]}, ["prompt", "1"], "valid string"),
        ("CompletionRequest", {"prompt": [1, "a"]}, ["prompt", "1"], "valid integer"),
        ("CompletionRequest", {"prompt": 5}, ["prompt"], "valid string"),
        ("CompletionRequest", {"prompt": ["a"] * 2049}, ["prompt"], "at most 2048 items"),
        ("CompletionRequest", {"prompt": [[1], [2**40]]}, ["prompt", "1", "0"], "less than"),
        ("CompletionRequest", {"prompt": "a", "stop": ["a"] * 17}, ["stop"], "at most 16 items"),
        ("EmbeddingCompletionRequest", {"input": ["a"] * 2049}, ["input"], "at most 2048 items"),
        ("ClassificationCompletionRequest", {"input": []}, ["input"], "at least 1 item"),
        ("ChatCompletionRequest", {"messages": ASKED, "tool_choice": "x"}, ["tool_choice"], "auto"),
        ("ChatCompletionRequest", {"messages": [{}, {"role": 1}]}, ["messages", "0", "role"], ""),
    ],
)
def test_of_several_forms_the_one_that_was_meant_is_told(
    kind: str, body: dict[str, Any], place: list[str], says: str
) -> None:
    with pytest.raises(ValueError, match="validation error") as caught:
        read(kind, {"model": BASE, **body})
    told = fault(caught.value)
    assert told["loc"] == ["body", *place]
    assert says in told["msg"]
