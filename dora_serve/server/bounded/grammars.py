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

from dora_serve.onnxruntime.grammar import limits

from ..wire.errors import ApiError
from ..wire.parameters import LONGEST

_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # a weak model would write it without end
_DEEPEST = 64  # objects and arrays in one another, as in vLLM
_QUICK = 1.0  # seconds of the processor
_STACK = 1 << 20  # bytes; threads have 2 or 8 MiB
# Keywords of a schema whose values are schemas, by name or not.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


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
            return str(_json(given))
        if given["regex"] is not None:
            return str(LLMatcher.grammar_from_regex(given["regex"]))
        if given["choice"] is not None:
            choices = " | ".join(json.dumps(each) for each in given["choice"])
            return str(LLMatcher.grammar_from_lark(f"start: {choices}"))
        return str(grammar_from("grammar", given["grammar"]))
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the schema or grammar: {str(error)[:500]}", code="bad_grammar") from None


def _json(given: dict[str, Any]) -> Any:
    from llguidance import LLMatcher

    schema = given["json"]
    if isinstance(schema, str):
        schema = from_json(schema)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    if _is_deeper(schema, _DEEPEST):
        raise ValueError(f"more than {_DEEPEST} objects and arrays in one another")
    if given["closed"]:
        _close(schema)
    options: Any = {"whitespace_flexible": given["flexible"]}
    if given["flexible"]:
        options["whitespace_pattern"] = given["pattern"] or _SPACE
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [
            child for each in inner for child in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in level)


def _close(schema: Any) -> None:
    """Let no object have names that its schema does not have."""
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        inner = value.values() if name in _BY_NAME and isinstance(value, dict) else [value]
        for each in inner:
            if name not in ("enum", "const", "default", "examples"):
                _close(each)
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
