"""What the routes of one server share."""

from __future__ import annotations

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
    """`root`: the folder that is served."""

    root: Path
    models: Registry
    options: ServerOptions
    metrics: Metrics = field(default_factory=Metrics)
    ready: bool = False


def state_of(request: Request) -> State:
    state: State = request.app.state.server
    return state


def note(request: Request, **facts: Any) -> None:
    """Have the log tell these of the request; never its text."""
    request.scope[NOTES].update(facts)
