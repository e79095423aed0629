"""Texts to tokens, beside the event loop where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from .wire.requests import Text

T = TypeVar("T")
_LONG = 20_000  # characters, or tokens that were given, that are not worked on in the event loop


async def each(work: Callable[[Text], T], inputs: Sequence[Text]) -> list[T]:
    """`work` of every input, in another thread when together they are long."""
    if sum(map(len, inputs)) < _LONG:
        return [work(given) for given in inputs]
    return await asyncio.to_thread(lambda: [work(given) for given in inputs])
