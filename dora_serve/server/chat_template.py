"""The chat template beside a tokenizer, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic_core import from_json

from dora_serve.onnxruntime.session import OnnxFolder

from ..folder.templates import chat_template, read_template
from .wire.errors import ApiError

_END = "CONTINUE_FINAL_MESSAGE_TAG "  # behind a message that is continued


class _Generation(Extension):
    """`{% generation %}` marks what is trained on; the text is the same."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Of the model in `folder`, or the one in `file`. A template may neither call what it likes nor
    change anything."""

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        self._folder, self._file = folder, file

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        return OnnxFolder(self._folder).special_tokens

    @cached_property
    def text(self) -> str | None:
        """The template itself; None where there is none."""
        if self._file is None:
            return chat_template(self._folder)
        return read_template(self._file) or None

    @cached_property
    def _template(self) -> Any:
        if self.text is None:
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation: bool,
        values: Mapping[str, Any] | None = None,
        continued: bool = False,
    ) -> str:
        """The prompt for `messages`, with `generation` up to where the answer begins, with
        `continued` up to the end of the last message's text. `values`: what else the template
        may name. The arguments of calls may be JSON as text, which templates take read.

        Raises `ApiError` when there is no template, or it refuses the messages.
        """
        if continued:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": last["content"] + _END}]
        try:
            named = {
                **self._special_tokens,
                "tools": None,
                "documents": None,
                **(values or {}),
                "messages": [_read(message) for message in messages],
                "add_generation_prompt": generation,
            }
            text: str | None = self._template and self._template.render(named)
        except Exception as error:  # a template is a program of whoever made the model
            raise ApiError(f"the chat template: {error}", param="messages") from None
        if text is None:
            raise ApiError(
                "This model's tokenizer has no chat template: use /v1/completions, or give one "
                "to the server (`dora-serve up --chat-template FILE`).",
                code="no_chat_template",
            )
        return _until_end(text) if continued else text


def _read(message: Mapping[str, Any]) -> Mapping[str, Any]:
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


def _until_end(text: str) -> str:
    """The text before `_END`, as transformers cuts it: a template that strips messages has stripped
    what was to be continued too."""
    before, found, behind = text.rpartition(_END.strip())
    if not found:
        raise ApiError("the chat template leaves out the message to continue", param="messages")
    return before if behind.startswith(" ") else before.rstrip()


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})
