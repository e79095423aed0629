"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request

from .bounded.process import Process
from .metrics import Metrics
from .options import ServerOptions
from .registry import Registry
from .turns import Turns

if TYPE_CHECKING:
    from .routes.preparing import Making

NOTES = "dora_serve"  # in a request's scope: what the log tells of it


@dataclass
class State:
    """`root`: the folder that is served. `adding`: runs are converted one at a time. `making`: the
    runs that are being converted because a request names them.
    `bodies`: reads the large ones first; `grammars`: reads what answers have to follow."""

    root: Path
    models: Registry
    options: ServerOptions
    metrics: Metrics = field(default_factory=Metrics)
    ready: bool = False
    adding: Turns = field(default_factory=lambda: Turns(16))
    making: dict[str, Making] = field(default_factory=dict)
    bodies: Process = field(default_factory=Process)
    grammars: Process = field(default_factory=Process)

    @property
    def processes(self) -> list[Process]:
        """Those beside this one."""
        return [
            self.bodies,
            self.grammars,
            *(texts.process for texts in self.models.texts.values()),
        ]


def state_of(request: Request) -> State:
    state: State = request.app.state.server
    return state


def note(request: Request, **facts: Any) -> None:
    """Have the log tell these of the request; never its text."""
    request.scope[NOTES].update(facts)
