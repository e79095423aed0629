"""The turns of a conversation, as clients send them and as chat templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from .parameters import Parameters, refusal

_T = TypeVar("_T")
Several = Annotated[list[_T], Field(max_length=2048, fail_fast=True)]


_TEXTS = ("text", "refusal", "input_text", "output_text")


class Part(Parameters):
    """A piece of a text; `refusal` where a client hands back a model's refusal."""

    kept_empty: ClassVar = frozenset({"text", "refusal"})

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind not in _TEXTS:
            raise refusal("type", f"{kind[:50]!r} is not served: texts alone are read")
        return given

    type: Literal["text", "refusal", "input_text", "output_text"] = "text"
    text: str = ""
    refusal: str = ""


def plain_content(content: str | Sequence[Part] | None) -> str | list[dict[str, str]]:
    """As `ChatTemplate` takes it: of several parts each."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.text or part.refusal for part in content]
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return "".join(texts)


class CalledFunction(Parameters):
    """`arguments`: JSON as text."""

    kept_empty: ClassVar = frozenset({"arguments"})
    name: str
    arguments: str = "{}"


class ToolCall(Parameters):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


def form(content: Any) -> str:
    """Whether a content is told as a text or as its parts."""
    return "parts" if isinstance(content, list) else "text"


_Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[Several[Part], Tag("parts")], Discriminator(form)
]


class Message(Parameters):
    """One turn of a conversation, with what clients hand back of an earlier answer."""

    kept_empty: ClassVar = frozenset({"content"})
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Several[ToolCall] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    # Of an answer that is handed back; there is none with a value here.
    annotations: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, Any]:
        """As `ChatTemplate` takes it."""
        content = plain_content(self.content) or self.refusal or ""
        turn: dict[str, Any] = {"role": self.role, "content": content}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                turn[name] = value
        if (thought := self.reasoning or self.reasoning_content) is not None:
            turn["reasoning"] = turn["reasoning_content"] = thought
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return turn
