"""Schemas, patterns and grammars as llguidance reads them.

What passes here is compiled once more for its model, in the server: so it must be quick here, and
not nested as deeply as a thread's stack there allows.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic_core import from_json

from dora_serve.onnxruntime.grammar import limits, unforced

from ..wire.errors import ApiError
from ..wire.parameters import LONGEST
from ..wire.schemas import schemas
from . import gbnf

_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # a weak model would write it without end
_DEEPEST = 64  # objects and arrays in one another, as in vLLM
_QUICK = 1.0  # seconds of the processor
_STACK = 1 << 20  # bytes; threads have 2 or 8 MiB
# The limits of 64 bits, and the doubles within them.
_LOWEST = {-(2**63): 1024 - 2**63}
_HIGHEST = {2**63 - 1: 2**63 - 1024, 2**64 - 1: 2**63 - 1024}
_BOUNDS = {
    "minimum": _LOWEST,
    "exclusiveMinimum": _LOWEST,
    "maximum": _HIGHEST,
    "exclusiveMaximum": _HIGHEST,
}


def read(blob: bytes) -> tuple[Any, bytes]:
    """The grammar for what `wire.structure.asked` told, as text. Raises `ApiError` for what is
    wrong or too large."""
    given = json.loads(blob)
    if len(blob) > LONGEST:
        raise ApiError(f"a schema or grammar has more than {LONGEST} bytes", code="too_expensive")
    grammar = _grammar(given)
    from llguidance import LLMatcher

    if wrong := LLMatcher.validate_grammar(grammar, limits=limits()):
        raise ApiError(f"the schema or grammar: {wrong[:500]}", code="bad_grammar")
    before = threading.stack_size(_STACK)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(_compiled, grammar)
    threading.stack_size(before)
    wrong, seconds = found.result()
    if wrong:
        raise ApiError(f"the schema or grammar: {wrong[:500]}", code="bad_grammar")
    if seconds > _QUICK:
        raise ApiError("the schema or grammar takes too long", code="too_expensive")
    return None, grammar.encode()


def _compiled(grammar: str) -> tuple[str, float]:
    """What is wrong with a grammar for a model whose tokens are bytes, and how long it took."""
    from llguidance import LLMatcher, LLTokenizer

    begin = time.thread_time()
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error() or "", time.thread_time() - begin


def _grammar(given: dict[str, Any]) -> str:
    from llguidance import LLMatcher, grammar_from

    try:
        if "json" in given:
            return _json(given)
        if given["regex"] is not None:
            return str(LLMatcher.grammar_from_regex(given["regex"]))
        if given["choice"] is not None:
            choices = " | ".join(json.dumps(each) for each in given["choice"])
            return str(LLMatcher.grammar_from_lark(f"start: {choices}"))
        text = given["grammar"]
        if gbnf.is_gbnf(text):
            return unforced(str(grammar_from("gbnf", gbnf.plain(text))))
        return unforced(str(LLMatcher.grammar_from_lark(text)))
    except (TypeError, ValueError, RecursionError) as error:  # half a surrogate pair is the first
        raise ApiError(f"the schema or grammar: {str(error)[:500]}", code="bad_grammar") from None


def _json(given: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    schema = given["json"]
    if isinstance(schema, str):
        schema = from_json(schema)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    if _is_deeper(schema, _DEEPEST):
        raise ValueError(f"more than {_DEEPEST} objects and arrays in one another")
    for each in schemas(schema):
        _have_doubles(each)
        if given["closed"] and "properties" in each:  # names that it has, and no others
            each.setdefault("additionalProperties", False)
    options: Any = {"whitespace_flexible": given["flexible"]}
    if given["flexible"]:
        options["whitespace_pattern"] = given["pattern"] or _SPACE
    found = str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))
    return unforced(found) if given["pattern"] else found


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [
            child for each in inner for child in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in level)


def _have_doubles(schema: dict[str, Any]) -> None:
    """Have a schema's numbers be such as llguidance, to which all are doubles, takes for the same.
    Raises `ValueError` for others."""
    for name, inner in _BOUNDS.items():
        bound = schema.get(name)
        if isinstance(bound, int):
            schema[name] = bound = inner.get(bound, bound)
            _check_double(name, bound, 2**1000)
    for name in ("const", "enum"):
        for value in _inner(schema.get(name)):
            if isinstance(value, int):
                _check_double(name, value, 2**63 - 1)


def _check_double(name: str, value: int, most: int) -> None:
    if abs(value) > most or float(value) != value:
        raise ValueError(f"{name}: {str(value)[:100]} cannot be written exactly: use a text")


def _inner(value: Any) -> list[Any]:
    """All values in a value, itself among them."""
    found = [value]
    for each in found:
        if isinstance(each, dict | list):
            found += each.values() if isinstance(each, dict) else each
    return found
