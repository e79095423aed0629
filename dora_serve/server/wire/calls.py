"""Calls of tools in what a model writes, found as it grows."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod

from . import forms
from .forms import Json, Tools
from .tools import Choice, NamedTool

_LLAMA = "<|python_tag|>"
# What Mistral's templates take alone: of letters and digits, and as long as this.
_ID = 9


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
            "id": uuid.uuid4().hex[:_ID],
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
    """Calls in any of the forms that `forms.py` reads: in tags, behind a mark of Mistral's, or as
    all of the text, which is JSON (Llama 3; lists of calls, as `required` has them)."""

    def __init__(self, tools: Tools) -> None:
        super().__init__()
        self._tools = tools
        self._text = ""
        self._begun = False  # text that is no call was told
        self._blank: str | None = None  # behind a call, as long as nothing else is

    def add(self, piece: str, last: bool) -> tuple[str, list[Json]]:
        self._text += piece
        if not self._begun and not self.count and self._may_be_json():
            if not last:
                return "", []
            if calls := forms.of_json(self._text.strip().removeprefix(_LLAMA), self._tools):
                self._text = ""
                return "", [self._call(*call) for call in calls]
        return self._marked(last)

    def _may_be_json(self) -> bool:
        text = self._text.lstrip()
        marks = ("{", "[", _LLAMA)
        return not text or text.startswith(marks) or _LLAMA.startswith(text)

    def _marked(self, last: bool) -> tuple[str, list[Json]]:
        told, calls = "", []
        while True:
            begin = forms.BEGIN.search(self._text)
            if begin is None:
                held = 0 if last else forms.begun(self._text)
                told += self._between(self._text[: len(self._text) - held])
                self._text = self._text[len(self._text) - held :]
                break
            told += self._between(self._text[: begin.start()])
            self._text = self._text[begin.start() :]
            whole, rest = forms.region(self._text, begin[0])
            if rest is None and not last:
                break
            found = forms.calls(whole, begin[0], self._tools)
            if not found:
                told += self._between(whole)
            for call in found:
                calls.append(self._call(*call))
                self._blank = ""
            self._text = rest or ""
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


def calls_of(choice: Choice | None, tools: Tools) -> Calls | None:
    """What finds the calls of an answer to a request with these tools; None where none are told."""
    if not tools or choice in (None, "none"):
        return None
    if isinstance(choice, NamedTool):
        return NamedCall(choice.function.name)
    return WrittenCalls(tools)
