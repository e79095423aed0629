"""Runs whose adapters are made when a request first names them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from fastapi import Request

from converters.errors import DoraExportError

from ..prepare.child import add_model
from ..prepare.offer import Addition
from ..state import State, state_of
from ..wire.errors import ApiError
from ..wire.places import told
from ..wire.sending import while_there


async def made(request: Request, name: object) -> None:
    """Have the adapter of the model `name` made, where there is such a one without.

    Raises `ApiError` 503 when it cannot be made, 429 where too many others wait for theirs. Of the
    requests that name one run a single one waits for a turn, and none whose client left.
    """
    state = state_of(request)
    if not isinstance(name, str) or _run(state, name) is None:
        return
    async with AsyncExitStack() as turn:
        await while_there(request, _wait(turn, state, name))
        if (run := _run(state, name)) is not None:
            graph = state.models.graphs[state.models.find(name).model.folder]
            wanted = Addition(root=str(state.root), path=run, name=name, graphs=[graph])
            try:
                model = await asyncio.to_thread(add_model, wanted)
            except DoraExportError as error:
                raise ApiError(told(str(error), state.root), 503, "model") from None
            if _run(state, name) == run:  # as long as nobody took it away
                state.models.add(model)


async def _wait(turn: AsyncExitStack, state: State, name: str) -> None:
    await turn.enter_async_context(state.making[name])
    if _run(state, name) is not None:
        await turn.enter_async_context(state.adding.take())


def _run(state: State, name: str) -> str | None:
    return state.models.find(name).model.run if name in state.models else None
