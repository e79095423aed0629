"""What the routes of one server share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request

from .metrics import Metrics
from .options import ServerOptions
from .registry import Registry

NOTES = "dora_serve"  # in a request's scope: what the log tells of it


@dataclass
class State:
    """`root`: the folder that is served. `adding`: held while a run is converted, one at a time."""

    root: Path
    models: Registry
    options: ServerOptions
    metrics: Metrics = field(default_factory=Metrics)
    ready: bool = False
    adding: asyncio.Lock = field(default_factory=asyncio.Lock)


def state_of(request: Request) -> State:
    state: State = request.app.state.server
    return state


def note(request: Request, **facts: Any) -> None:
    """Have the log tell these of the request; never its text."""
    request.scope[NOTES].update(facts)
