"""What was read last stays in memory, up to a number of bytes: one allowance for the process.

A command asks for an update several times (its rank, its norm, its factors), and reading it, taking
out what was pruned and checking that the rest is independent cost more than all else that an
adapter takes. One allowance for all runs, and not one for each, because a server holds a thousand
runs as long as it lives, and a run that keeps its factors would make it grow with every one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import fields, is_dataclass
from weakref import ref

import torch

from .update import Update

MOST_BYTES = 256 << 20


class Memo:
    """Updates by name; `remember` forgets those of any memo that were asked for longest ago.

    What was remembered last always stays, however large.
    """

    def __init__(self) -> None:
        self._held: dict[str, Update] = {}

    def get(self, name: str) -> Update | None:
        return self._held.get(name)

    def remember(self, name: str, update: Update) -> None:
        global _total
        size = held_bytes(update)
        with _lock:
            key = ref(self), name
            _total += size - _sizes.pop(key, 0)
            self._held[name], _sizes[key] = update, size
            while _total > MOST_BYTES and len(_sizes) > 1:
                (owner, oldest), size = _sizes.popitem(last=False)
                _total -= size
                memo = owner()
                if memo is not None:
                    del memo._held[oldest]


_Key = tuple["ref[Memo]", str]

_lock = threading.Lock()
_sizes: OrderedDict[_Key, int] = OrderedDict()
_total = 0


def held_bytes(value: object) -> int:
    """The memory of the tensors in an update, or in what an update is made of."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, tuple):
        return sum(map(held_bytes, value))
    if is_dataclass(value):
        return sum(held_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
