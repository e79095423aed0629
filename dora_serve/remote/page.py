"""A web server's list of a folder, which may be as long as it likes."""

from __future__ import annotations

from typing import Any

from aiohttp import ClientPayloadError, ClientResponse

_LARGEST = 16 << 20  # bytes: some hundred thousand names


class Page(ClientResponse):
    """An answer whose text, which fsspec asks of lists alone, has a bound."""

    async def text(self, *given: Any, **named: Any) -> str:
        """Raises `ClientPayloadError` beyond it."""
        if self._body is None:
            body = bytearray()
            async for piece in self.content.iter_any():
                body += piece
                if len(body) > _LARGEST:
                    self.close()
                    raise ClientPayloadError(f"the list of a folder has over {_LARGEST:,} bytes")
            self._body = bytes(body)
        return await super().text(*given, **named)
