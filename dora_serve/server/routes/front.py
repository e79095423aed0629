"""The page at `/`: the files of `page/`, as they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

_FOLDER = Path(__file__).parents[1] / "page"
_KINDS = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Its own files and the API, nothing else: no answer of a model can become script.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def front() -> tuple[APIRouter, frozenset[str]]:
    """The routes of the page, and their paths, which need no key."""
    router = APIRouter()
    files = {f"/{file.name}": file for file in _FOLDER.iterdir()}
    files["/"] = files.pop("/index.html")
    for path, file in files.items():
        router.add_api_route(path, _sender(file), include_in_schema=False)
    return router, frozenset(files)


def _sender(file: Path) -> Callable[[], Awaitable[Response]]:
    content, kind = file.read_bytes(), _KINDS[file.suffix]

    async def send() -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return send
