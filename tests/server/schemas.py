"""Random JSON schemas of the kinds that people write, small enough that an answer ends."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "age", "id", "city", "größe", "a b", "x_1", "tags", "unit", "on")


def schema(seed: int) -> dict[str, Any]:
    """One of an object, as most APIs want it."""
    choose = random.Random(seed)
    found = _object(choose, 2)
    if choose.random() < 0.2:
        found["$defs"] = {"part": _value(choose, 0)}
        found["properties"]["ref"] = {"$ref": "#/$defs/part"}
        found["required"].append("ref")
    return found


def _object(choose: random.Random, depth: int) -> dict[str, Any]:
    names = choose.sample(_WORDS, choose.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(choose, depth - 1) for name in names},
        "required": choose.sample(names, choose.randint(1, len(names))),
        "additionalProperties": False,
    }


def _value(choose: random.Random, depth: int) -> dict[str, Any]:
    flat = [_integer, _number, _string, _pattern, _enum, _const, _boolean, _nullable, _format]
    deep = [_array, _tuple, _any_of, lambda chosen: _object(chosen, depth)]
    made: dict[str, Any] = choose.choice(flat + deep * (depth > 0))(choose)
    return made


def _integer(choose: random.Random) -> dict[str, Any]:
    least = choose.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + choose.randint(0, 200)}


def _number(choose: random.Random) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "maximum": choose.choice([1, 2.5, 100])}


def _string(choose: random.Random) -> dict[str, Any]:
    least = choose.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + choose.randint(0, 5)}


def _pattern(choose: random.Random) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": choose.choice(["^[a-z]{2,4}$", r"^\d{3}-\d{2}$", "^(a|b)c?$"]),
    }


def _format(choose: random.Random) -> dict[str, Any]:
    return {"type": "string", "format": choose.choice(["date", "uuid", "ipv4"])}


def _enum(choose: random.Random) -> dict[str, Any]:
    return {"enum": choose.sample(["red", 'it\'s "x"', 3, -1.5, None, True, "水"], 3)}


def _const(choose: random.Random) -> dict[str, Any]:
    return {"const": choose.choice(["fixed", 7, None])}


def _boolean(choose: random.Random) -> dict[str, Any]:
    return {"type": "boolean"} | ({"title": "on"} if choose.random() < 0.5 else {})


def _nullable(choose: random.Random) -> dict[str, Any]:
    return {"type": [choose.choice(["boolean", "null"]), "null"]}


def _array(choose: random.Random) -> dict[str, Any]:
    least = choose.randint(0, 2)
    return {"type": "array", "items": _value(choose, 0), "minItems": least, "maxItems": least + 2}


def _tuple(choose: random.Random) -> dict[str, Any]:
    parts = [_value(choose, 0) for _ in range(2)]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}


def _any_of(choose: random.Random) -> dict[str, Any]:
    return {"anyOf": [_integer(choose), _pattern(choose), {"type": "null"}]}
