"""The HTTP application over the engines."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from .guard import Guard, is_loopback
from .routes import (
    adapters,
    answering,
    encoding,
    generating,
    hearing,
    invoking,
    operation,
    pooling,
    responding,
    scoring,
    tokens,
)
from .routes.front import front
from .state import State
from .wire import errors


def make_app(state: State, host: str, api_key: str | None) -> FastAPI:
    """The application for `state`; it ends the engines when it ends."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        soon = [each for each in state.processes if each is not state.grammars]
        begun = asyncio.gather(*(each.start() for each in soon), return_exceptions=True)
        gc.freeze()  # what is there stays: nobody needs to look for garbage in it
        state.ready = True
        yield
        state.ready = False
        begun.cancel()
        with suppress(asyncio.CancelledError):  # else its end is told as an error of nobody's
            await begun
        state.models.close()
        for each in state.processes:
            await each.close()

    app = FastAPI(
        title="dora-serve",
        lifespan=life,
        openapi_url=None,  # `operation` tells it, beside the event loop
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": errors.ErrorAnswer}},
    )
    app.state.server = state
    state.metrics.watch(state.models)
    errors.install(app)
    for module in (
        operation,
        generating,
        responding,
        encoding,
        answering,
        hearing,
        scoring,
        pooling,
        tokens,
        invoking,
        adapters,
    ):
        app.include_router(module.router)
    page, paths = front()
    app.include_router(page)
    app.add_middleware(
        Guard,
        api_key=api_key,
        max_body=state.options.max_body,
        local=api_key is None and is_loopback(host),
        page=paths,
        metrics=state.metrics,
    )
    return app
