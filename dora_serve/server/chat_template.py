"""The chat template beside a tokenizer, rendered as transformers renders it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, Template
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic_core import from_json

from dora_serve.onnxruntime.session import OnnxFolder

from ..folder.templates import DEFAULT, WITH_TOOLS, chat_templates
from .wire.errors import ApiError

_END = "CONTINUE_FINAL_MESSAGE_TAG "  # behind a message that is continued
_SYSTEMS = ("system", "developer")
Message = Mapping[str, Any]
Turns = list[Message]


class _Generation(Extension):
    """`{% generation %}` marks what is trained on; the text is the same."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Of the model in `folder`, or the one that is `given`. A template may neither call what it
    likes nor change anything."""

    def __init__(self, folder: Path, given: str | None = None) -> None:
        self._folder, self._given = folder, given
        self._compiled: dict[str, Template] = {}

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        return OnnxFolder(self._folder).special_tokens

    @cached_property
    def _texts(self) -> dict[str, str]:
        if self._given is None:
            return chat_templates(self._folder)
        return {DEFAULT: self._given} if self._given else {}

    def said(self) -> str:
        """All that the folder says of it, which is read once."""
        return json.dumps([self._special_tokens, self._texts])

    @property
    def text(self) -> str | None:
        """The template itself, where there are no tools; None where there is none."""
        return self._texts.get(DEFAULT)

    @cached_property
    def _environment(self) -> Environment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment

    def _template(self, name: str) -> Template:
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._texts[name])
        return self._compiled[name]

    def render(
        self,
        messages: Sequence[Message],
        generation: bool,
        values: Mapping[str, Any] | None = None,
        continued: bool = False,
    ) -> str:
        """The prompt for `messages`, with `generation` up to where the answer begins, with
        `continued` up to the end of the last message's text. `values`: what else the template
        may name. The arguments of calls may be JSON as text, which templates take read. A content
        may be a list of texts' parts, which stay apart in a template that writes each.

        Raises `ApiError` when there is no template, or it refuses the messages.
        """
        name = WITH_TOOLS if (values or {}).get("tools") and WITH_TOOLS in self._texts else DEFAULT
        if name not in self._texts:
            raise ApiError(
                "This model's tokenizer has no chat template: use /v1/completions, or give one "
                "to the server (`dora-serve up --chat-template FILE`).",
                code="no_chat_template",
            )
        turns = [_read(message) for message in messages]
        if not any(f"{quote}developer{quote}" in self._texts[name] for quote in "'\""):
            turns = _of_systems(turns)
        begun, turns[-1] = _with_end(turns[-1]) if continued else ("", turns[-1])
        named = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(values or {}),
            "add_generation_prompt": generation,
        }
        try:
            template = self._template(name)
            text = template.render({**named, "messages": _joined(template, named, turns)})
        except Exception as error:  # a template is a program of whoever made the model
            raise ApiError(f"the chat template: {error}", param="messages") from None
        return _until_end(text, begun) if continued else text


def _joined(template: Template, named: Mapping[str, Any], turns: Turns) -> Turns:
    """The turns with one text for what has several parts, but of a role whose parts the template
    writes one by one: what others make of a list is an error, nothing, or Python. What a tool said
    is always one text."""
    several = {turn["role"] for turn in turns if not isinstance(turn["content"], str)} - {"tool"}
    apart = {role for role in several if _takes_parts(template, named, turns, role)}
    return [turn if turn["role"] in apart else _as_one(turn) for turn in turns]


def _as_one(turn: Message) -> Message:
    content = turn["content"]
    if isinstance(content, str):
        return turn
    return {**turn, "content": "\n".join(part["text"] for part in content)}


def _takes_parts(template: Template, named: Mapping[str, Any], turns: Turns, role: str) -> bool:
    """Whether every part of the contents of `role` comes out, and not as JSON or as Python, which
    writes a mark of its own for these letters."""
    marks = count()
    marked: Turns = []
    for turn in turns:
        if isinstance(turn["content"], str) or turn["role"] != role:
            marked.append(_as_one(turn))
            continue
        own = [{"type": "text", "text": f"\ue000{next(marks)}\ue001"} for _ in turn["content"]]
        marked.append({**turn, "content": own})
    try:
        text = template.render({**named, "messages": marked})
    except Exception:
        return False
    found = set(re.findall('(?<!")\ue000([0-9]+)\ue001(?!")', text))
    return len(found) == next(marks)


def _of_systems(turns: Turns) -> Turns:
    """The turns for a template that knows no developer: what he says is the system's, which most
    templates take at the begin alone."""
    if all(turn["role"] != "developer" for turn in turns):
        return turns
    said = [_as_one(turn)["content"] for turn in turns if turn["role"] in _SYSTEMS]
    content = "\n\n".join(text for text in said if text)
    others = [turn for turn in turns if turn["role"] not in _SYSTEMS]
    return [{"role": "system", "content": content}, *others]


def _with_end(turn: Message) -> tuple[str, Message]:
    """The text at the end of a turn, and the turn with `_END` behind it."""
    content = turn["content"]
    if isinstance(content, str):
        return content, {**turn, "content": content + _END}
    text = content[-1]["text"]
    return text, {**turn, "content": [*content[:-1], {**content[-1], "text": text + _END}]}


def _read(message: Message) -> Message:
    message = message if "content" in message else {**message, "content": ""}
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call["function"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _arguments(function: Mapping[str, Any]) -> Any:
    given = function.get("arguments")
    try:
        return from_json(given or "{}") if isinstance(given, str) else given
    except ValueError:  # as the model wrote it
        return given


def _until_end(text: str, begun: str) -> str:
    """The text before `_END`, as transformers cuts it: a template that strips messages has stripped
    what was to be continued too. One that leaves out more of what was `begun` is refused."""
    before, found, behind = text.rpartition(_END.strip())
    if not found or begun.strip() not in text:
        raise ApiError("the chat template leaves out the message to continue", param="messages")
    return before if behind.startswith(" ") else before.rstrip()


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})
