"""Changes at random to what a target reads: to its JSON, or to its bytes."""

from __future__ import annotations

import json
import random
from typing import Any

SPLIT = b"\0DATA\0"  # between the header and the data of a safetensors file

_VALUES: list[object] = [
    None, True, False, 0, -1, 1, 2, 1 << 31, 1 << 63, 1 << 64, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "\0", "..", "/etc/passwd", "q_proj", "LOHA", "(", "(a+)+$",
    "\u202e", "\ud800", "9" * 5000, [], [[]], [0, 10**6], {}, {"": {}}, {"q_proj": "2"}, {"(": 1},
]  # fmt: skip


def mutated(data: bytes, text: bool, chance: random.Random) -> bytes:
    """`data` with one change: to a value of its JSON, or to its bytes."""
    if text and chance.random() < 0.8:
        head, split, rest = data.partition(SPLIT)
        try:
            return _change(json.loads(head), chance) + split + rest
        except (ValueError, RecursionError):
            pass
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(changed) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 64))
        kind = chance.randrange(4)
        if kind == 0:
            changed[at : at + size] = chance.randbytes(size)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = changed[chance.randrange(len(changed) + 1) :][:size]
        elif at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _change(value: object, chance: random.Random) -> bytes:
    holders: list[tuple[Any, Any]] = []

    def walk(node: object) -> None:
        items: Any = node.items() if isinstance(node, dict) else ()
        for key, below in enumerate(node) if isinstance(node, list) else items:
            holders.append((node, key))
            walk(below)

    walk(value)
    if not holders or chance.random() < 0.02:
        return json.dumps(chance.choice(_VALUES)).encode()
    holder, key = chance.choice(holders)
    kind = chance.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        holder[str(chance.choice(_VALUES))] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        other, name = chance.choice(holders)
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = chance.choice(_VALUES)
    return json.dumps(value).encode()
