"""Runs whose adapters are made when a request first names them."""

from __future__ import annotations

import asyncio

from fastapi import Request

from converters.errors import DoraExportError

from ..prepare.child import add_model
from ..prepare.offer import Addition
from ..state import State, state_of
from ..wire.errors import ApiError
from ..wire.places import told
from ..wire.sending import while_there


class Making:
    """One try to have the adapter of the run `name` made, for all who wait for it. `begun`: it has
    had its turn."""

    def __init__(self, state: State, name: str) -> None:
        self.waiting, self.begun = 0, False
        self.task = asyncio.create_task(self._make(state, name))

    async def _make(self, state: State, name: str) -> None:
        try:
            async with state.adding.take():
                self.begun = True
                await _make(state, name)
        finally:
            if state.making.get(name) is self:
                del state.making[name]


async def made(request: Request, name: object) -> None:
    """Have the adapter of the model `name` made, where there is such a one without.

    Raises `ApiError` 503 when it cannot be made, 429 where too many others wait for theirs, 504
    when time is up. All who name a run meanwhile wait for the same try, and one for which nobody
    waits any more when its turn comes is none.
    """
    state = state_of(request)
    if not isinstance(name, str) or _run(state, name) is None:
        return
    making = state.making.get(name) or Making(state, name)
    state.making[name] = making
    making.waiting += 1
    try:
        async with asyncio.timeout(state.options.timeout):
            await while_there(request, asyncio.shield(making.task))
    except TimeoutError:
        message = "the model was not made ready in time"
        raise ApiError(message, 504, "model", "timeout") from None
    finally:
        making.waiting -= 1
        if not making.waiting and not making.begun:
            making.task.cancel()
            if state.making.get(name) is making:
                del state.making[name]


async def _make(state: State, name: str) -> None:
    if (run := _run(state, name)) is None:
        return
    graph = state.models.graphs[state.models.find(name).model.folder]
    wanted = Addition(root=str(state.root), path=run, name=name, graphs=[graph])
    try:
        model = await asyncio.to_thread(add_model, wanted)
    except DoraExportError as error:
        raise ApiError(told(str(error), state.root), 503, "model") from None
    if _run(state, name) == run:  # as long as nobody took it away
        state.models.add(model)


def _run(state: State, name: str) -> str | None:
    return state.models.find(name).model.run if name in state.models else None
