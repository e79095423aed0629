"""Calls of tools in what a model writes, found as it grows."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from .tools import Choice, NamedTool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"  # Hermes, Qwen
_MISTRAL, _LLAMA = "[TOOL_CALLS]", "<|python_tag|>"
Json = dict[str, Any]


class Calls(ABC):
    """What the text of one choice calls. `count`: calls so far."""

    def __init__(self) -> None:
        self.count = 0

    @abstractmethod
    def add(self, piece: str, last: bool) -> tuple[str, list[Json]]:
        """The text that is no call, and the calls or their parts, that `piece` makes certain."""

    def _call(self, name: str, arguments: str) -> Json:
        self.count += 1
        return {
            "index": self.count - 1,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


class NamedCall(Calls):
    """All of the text is the arguments of the tool `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def add(self, piece: str, last: bool) -> tuple[str, list[Json]]:
        if not self.count:
            return "", [self._call(self._name, piece)]
        part: Json = {"index": 0, "function": {"arguments": piece}}
        return "", [part] if piece or not last else []


class WrittenCalls(Calls):
    """Calls in the form of Hermes and Qwen (in tags), Mistral (behind a tag) or Llama 3 (all of the
    text is JSON), and lists of calls, as `required` has them."""

    def __init__(self, is_tool: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_tool = is_tool
        self._text = ""
        self._begun = False  # text that is no call was told
        self._blank: str | None = None  # behind a call, as long as nothing else is

    def add(self, piece: str, last: bool) -> tuple[str, list[Json]]:
        self._text += piece
        if not self._begun and not self.count and self._may_be_json():
            if not last:
                return "", []
            if calls := self._all():
                return "", calls
        return self._tagged(last)

    def _may_be_json(self) -> bool:
        text = self._text.lstrip()
        marks = ("{", "[", _LLAMA)
        return not text or text.startswith(marks) or _LLAMA.startswith(text)

    def _all(self) -> list[Json]:
        """The calls that the text is, none where it is anything else."""
        text = self._text.strip()
        for mark in (_MISTRAL, _LLAMA):
            text = text.removeprefix(mark)
        found = []
        for part in text.split(";") if text.startswith("{") and not _json(text) else [text]:
            read = _json(part)
            found += read if isinstance(read, list) else [read]
        calls = [_named(each) for each in found]
        if not calls or not all(call is not None and self._is_tool(call[0]) for call in calls):
            return []
        self._text = ""
        return [self._call(*call) for call in calls if call is not None]

    def _tagged(self, last: bool) -> tuple[str, list[Json]]:
        told, calls = "", []
        while True:
            before, opened, behind = self._text.partition(_OPEN)
            if not opened:
                held = 0 if last else _begun(self._text)
                told += self._between(self._text[: len(self._text) - held])
                self._text = self._text[len(self._text) - held :]
                break
            told += self._between(before)
            inside, closed, rest = behind.partition(_CLOSE)
            if not closed and not last:
                self._text = opened + behind
                break
            call = _named(_json(inside))
            if call is None:
                told += self._between(opened + inside + closed)
            else:
                calls.append(self._call(*call))
                self._blank = ""
            self._text = rest
        self._begun = self._begun or bool(told.strip())
        return told, calls

    def _between(self, text: str) -> str:
        """Text beside calls: nothing where it only sets them apart, which shows with what comes."""
        if self._blank is None:
            return text
        self._blank += text
        if not self._blank.strip():
            return ""
        told, self._blank = self._blank, None
        return told


def _begun(text: str) -> int:
    """How many characters at the end of `text` may be the begin of a tag."""
    return next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)


def _json(text: str) -> Any:
    try:
        return from_json(text.strip())
    except ValueError:
        return None


def _named(read: Any) -> tuple[str, str] | None:
    """The tool that is called and its arguments as JSON, None where nothing is."""
    if not isinstance(read, dict) or not isinstance(read.get("name"), str):
        return None
    arguments = read.get("arguments", read.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return read["name"], arguments


def calls_of(choice: Choice | None, names: frozenset[str]) -> Calls | None:
    """What finds the calls of an answer to a request with these tools; None where none are told."""
    if not names or choice in (None, "none"):
        return None
    if isinstance(choice, NamedTool):
        return NamedCall(choice.function.name)
    return WrittenCalls(names.__contains__)
