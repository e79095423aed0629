"""One at a time, and a bound on how many wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .wire.errors import ApiError


class Turns:
    """`take` waits for its turn; it raises `ApiError` 429 when `most` others have it or wait."""

    def __init__(self, most: int) -> None:
        self._lock, self._most, self._taken = asyncio.Lock(), most, 0

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        if self._taken >= self._most:
            raise ApiError("too many requests are waiting", 429, code="queue_full")
        self._taken += 1
        try:
            async with self._lock:
                yield
        finally:
            self._taken -= 1
