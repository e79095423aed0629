"""The HTTP application over the engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from . import adapters, encoding, errors, generating, operation, tokens
from .guard import Guard
from .state import State

_PAGE = Path(__file__).parent / "page"


def make_app(state: State, host: str, api_key: str | None) -> FastAPI:
    """The application for `state`; it ends the engines when it ends."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        state.ready = True
        yield
        state.ready = False
        state.models.close()

    app = FastAPI(
        title="dora-serve",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": errors.ErrorAnswer}},
    )
    app.state.server = state
    state.metrics.watch(state.models)
    errors.install(app)
    for module in (operation, generating, encoding, tokens, adapters):
        app.include_router(module.router)
    page: frozenset[str] = frozenset()
    if (_PAGE / "index.html").exists():
        page = frozenset(["/", *(f"/{p.relative_to(_PAGE).as_posix()}" for p in _PAGE.rglob("*"))])
        app.mount("/", StaticFiles(directory=_PAGE, html=True))
    app.add_middleware(
        Guard,
        api_key=api_key,
        max_body=state.options.max_body,
        local=api_key is None and is_loopback(host),
        page=page,
        metrics=state.metrics,
    )
    return app


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
