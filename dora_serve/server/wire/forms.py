"""The forms in which models write calls of tools, as their chat templates show them."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping
from math import isfinite
from typing import Any, NoReturn

Json = dict[str, Any]
Call = tuple[str, str]  # the tool, and its arguments as JSON

_MISTRAL, _FUNCTION, _PARAMETER = "[TOOL_CALLS]", "<function=", "<parameter="
# What a call begins with → what it ends with; None where calls are all that follows.
_ENDS = {
    "<tool_call>": "</tool_call>",  # Hermes, Qwen
    "<|tool_call|>": "<|/tool_call|>",  # Granite 3, which writes no end; Phi 4
    _FUNCTION: "</function>",  # Qwen without the tag around it, Llama 3's own form
    _MISTRAL: None,
}
# Which of them a tokenizer may have as special tokens, whose text is left out of other answers.
MARKS = ("<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", _MISTRAL, "[ARGS]",
         "[CALL_ID]")  # fmt: skip
BEGIN = re.compile("|".join(map(re.escape, _ENDS)))
# Of Mistral's newest: the name, an id where there is one, and the arguments.
# Nothing is tried in a second way: of blanks that go on and on that would take their square.
_NAMED = re.compile(r"\s*+([^\s\[\]{}]++)\s*+(?:\[CALL_ID\][^\[{]*+)?+(?:\[ARGS\])?+\s*+(?={)")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can say it, an answer cannot
_APART = re.compile(r"[\s;]*")
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "array": list,
    "string": str,
}
_SCHEMAS = 64  # that are looked through for the types of one parameter
_VALUES = 1024  # of an enumeration that are


class Tools:
    """Those of a request: the schemas of their arguments, by their names. The types of a parameter
    are looked for once, since a text may name it thousands of times."""

    def __init__(self, schemas: Mapping[str, Json]) -> None:
        self._schemas = schemas
        self._kinds: dict[tuple[str, str], set[str]] = {}

    def __len__(self) -> int:
        return len(self._schemas)

    def __contains__(self, name: str) -> bool:
        return name in self._schemas

    def kinds(self, tool: str, parameter: str) -> set[str]:
        """The types that a tool's schema names for one of its parameters."""
        root = self._schemas[tool]
        known = root.get("properties")
        if not isinstance(known, dict) or parameter not in known:
            return set()
        if (tool, parameter) not in self._kinds:
            self._kinds[tool, parameter] = _kinds(known[parameter], root)
        return self._kinds[tool, parameter]


def begun(text: str) -> int:
    """How many characters at the end of `text` may be the begin of a call."""
    longest = max(map(len, _ENDS))
    ends = (text[-n:] for n in range(longest - 1, 0, -1))
    return next((len(end) for end in ends if any(mark.startswith(end) for mark in _ENDS)), 0)


def region(text: str, mark: str) -> tuple[str, str | None]:
    """What of `text`, which begins with `mark`, may be calls, and what is behind it; None where it
    may go on."""
    end = _ENDS[mark]
    if end is None:
        return text, None
    inside, closed, rest = text.partition(end)
    return inside + closed, rest if closed else None


def calls(text: str, mark: str, tools: Tools) -> list[Call]:
    """The calls that a region is; none where it is anything else."""
    if mark == _MISTRAL:
        return _mistral(text.removeprefix(mark))
    if mark == _FUNCTION:
        return _function(text, tools)
    inside = text.removeprefix(mark).removesuffix(_ENDS[mark] or "").strip()
    return _function(inside, tools) if inside.startswith(_FUNCTION) else of_json(inside)


def of_json(text: str, tools: Tools | None = None) -> list[Call]:
    """The calls that all of `text` is: JSON, or several, line by line or behind semicolons. With
    `tools` none where it calls another."""
    found = []
    for value in _values(text):
        found += value if isinstance(value, list) else [value]
    named = [_named(value) for value in found]
    told = [call for call in named if call and (tools is None or call[0] in tools)]
    return told if len(told) == len(named) else []


def _mistral(text: str) -> list[Call]:
    """Behind the mark: a list, or a name and its arguments, each behind a mark of its own."""
    if listed := of_json(text.strip()):
        return listed
    found = []
    for part in text.split(_MISTRAL):
        name = _NAMED.match(part)
        values = _values(part[name.end() :].strip()) if name else []
        if name is None or len(values) != 1:
            return []
        found.append((name[1], _written(values[0])))
    return found


def _function(text: str, tools: Tools) -> list[Call]:
    """`<function=NAME>` around JSON, or around a tag for each parameter, whose values are texts
    that become what the tool's schema says."""
    name, _, body = text.removeprefix(_FUNCTION).strip().removesuffix("</function>").partition(">")
    if name not in tools:
        return []
    values = _values(body.strip())
    if len(values) == 1 and isinstance(values[0], dict):
        return [(name, _written(values[0]))]
    before, *parts = body.split(_PARAMETER)
    if before.strip():
        return []
    arguments = {}
    for part in parts:
        key, _, value = part.partition(">")
        value = value.partition("</parameter>")[0].removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(value, tools.kinds(name, key))
    return [(name, _written(arguments))]


def _kinds(schema: Any, root: Json) -> set[str]:
    """The types that a schema and those in it name, also behind references to parts of `root`. Each
    is looked at once, and not too many: they may lead to one another in any number of ways."""
    kinds: set[str] = set()
    seen: set[int] = set()
    waiting = deque([schema])
    while waiting and len(seen) < _SCHEMAS:
        each = waiting.popleft()
        if not isinstance(each, dict) or id(each) in seen:
            continue
        seen.add(id(each))
        kinds |= _own_kinds(each)
        waiting.append(_part(root, each.get("$ref")))
        for key in ("anyOf", "oneOf", "allOf"):
            others = each.get(key)
            waiting += others[:_SCHEMAS] if isinstance(others, list) else []
    return kinds


def _own_kinds(schema: Json) -> set[str]:
    """The types that it names, or its values have."""
    said = schema.get("type")
    named = said[:_SCHEMAS] if isinstance(said, list) else [said]
    kinds = {kind for kind in named if isinstance(kind, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if kinds or not isinstance(values, list):
        return kinds
    types = {type(value) for value in values[:_VALUES]}
    return {kind for kind, of in _KINDS.items() if any(issubclass(each, of) for each in types)}


def _part(root: Json, where: Any) -> Any:
    """The part of a schema to which it refers (`#`, `#/$defs/part`), None where there is none."""
    if not isinstance(where, str) or not where.startswith("#"):
        return None
    part: Any = root
    for name in where.split("/", _SCHEMAS)[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        part = part.get(name) if isinstance(part, dict) else None
    return part


def _typed(text: str, kinds: set[str]) -> Any:
    """A text as a value of one of the `kinds`; as it is where it is none."""
    if kinds <= {"string"}:
        return text
    said = text.strip()
    values = _values(said.lower() if said.lower() in ("true", "false", "null") else said)
    if len(values) != 1:
        return text
    fits = any(isinstance(values[0], _KINDS.get(kind, ())) for kind in kinds - {"string"})
    return values[0] if fits else text


def _values(text: str) -> list[Any]:
    """The values of JSON that `text` is, apart by blanks or semicolons; none where it is more."""
    found, at = [], 0
    while at < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        at = _APART.match(text, at).end()  # type: ignore[union-attr]
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if isfinite(value) else _no_number(digits)


_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)


def _named(read: Any) -> Call | None:
    """The tool that is called and its arguments, None where nothing is."""
    if not isinstance(read, dict) or not isinstance(read.get("name"), str):
        return None
    call = read["name"], _written(read.get("arguments", read.get("parameters", {})))
    return None if any(map(_HALF.search, call)) else call


def _written(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    text = json.dumps(arguments, ensure_ascii=False)
    return json.dumps(arguments) if _HALF.search(text) else text
