"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: training runs are taken too."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from converters.errors import DoraExportError

from ...folder.names import not_a_name
from ..prepare.child import add_model
from ..prepare.offer import Addition
from ..state import State, state_of
from ..wire.errors import ApiError
from ..wire.places import told
from ..wire.requests import LoadRequest, UnloadRequest
from ..wire.sending import while_there
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load(body: LoadRequest, request: Request) -> str:
    """Serve one more run or adapter from the served folder, converting it where need be."""
    state = state_of(request)
    async with AsyncExitStack() as turn:  # a client that leaves before its turn holds up nobody
        await while_there(request, turn.enter_async_context(state.adding.take()))
        await _add(state, body)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


async def _add(state: State, body: LoadRequest) -> None:
    name = body.lora_name
    if why := not_a_name(name):
        raise ApiError(why, param="lora_name")
    known = state.models.find(name) if name in state.models else None
    if known is not None and (not known.model.adapted or not body.load_inplace):
        raise ApiError(f"The name `{name}` is taken.", param="lora_name", code="already_loaded")
    path = _below(state.root, body.lora_path)
    wanted = Addition(root=str(state.root), path=str(path), name=name, graphs=state.models.own())
    try:
        model = await asyncio.to_thread(add_model, wanted)
    except DoraExportError as error:
        said = told(str(error), state.root)
        raise ApiError(said, param="lora_path", code="not_possible") from None
    if name in state.models:
        state.models.remove(name)
    state.models.add(model)


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload(body: UnloadRequest, request: Request) -> str:
    """Serve a run or adapter no longer; what is running with it goes on."""
    models = state_of(request).models
    if not models.find(body.lora_name).model.adapted:
        raise ApiError(f"`{body.lora_name}` is a base model.", param="lora_name")
    models.remove(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _below(root: Path, given: str) -> Path:
    """The folder that `given` names, from `root` on or in full; raises `ApiError` for one that is
    not there, and says the same for one that is elsewhere."""
    try:
        top, path = root.resolve(), (root / given).resolve()
        inside = path.is_relative_to(top) and path.is_dir()
    except (OSError, ValueError, RuntimeError):  # a name no file can have, a link to itself
        inside = False
    if not inside:
        raise ApiError(
            "There is no such folder below the one that is served.", 404, "lora_path", "not_found"
        )
    return root / path.relative_to(top)
