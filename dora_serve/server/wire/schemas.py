"""The schemas in a JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Keywords whose values are schemas by a name, and those whose values are none.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NONE = ("enum", "const", "default", "examples")


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """`schema` and all that lie in it, but for true and false."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        if not isinstance(each, dict):
            continue
        yield each
        for name, value in each.items():
            if name in _BY_NAME and isinstance(value, dict):
                waiting += value.values()
            elif name not in _NONE:
                waiting.append(value)
