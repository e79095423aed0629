"""The embedded server as a Ray Serve application: `import_path` of what `deploy --to ray` writes.

Every replica opens all graphs of the folder and loads any of its adapters when a request names it,
so a request may go to any replica.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from ray import serve

from dora_serve.onnxruntime.limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response


class Arguments(BaseModel):
    """`args` of the application. `folder`, `base`: as the machines of the cluster see them.
    `threads`: of each engine."""

    model_config = ConfigDict(extra="forbid")

    folder: str
    base: str | None = None
    threads: int | None = None


def application(args: Mapping[str, object]) -> Application:
    """The application; `args` as `Arguments`. Requests must have the key of the replicas'
    `$DORA_SERVE_API_KEY`, where that is set."""
    wanted = Arguments.model_validate(args)

    def build() -> FastAPI:
        return _app(wanted)

    # A batch, and as many that wait for its rows.
    embedded = serve.deployment(name="Embedded", max_ongoing_requests=2 * Limits().max_rows)
    return embedded(serve.ingress(build)()).bind()


def _app(wanted: Arguments) -> FastAPI:
    """In a replica: prepare what its machine's cache lacks, and open it."""
    from starlette.routing import Route

    from dora_serve.server.app import make_app
    from dora_serve.server.options import ServerOptions
    from dora_serve.server.prepare.child import make_offer
    from dora_serve.server.registry import Registry
    from dora_serve.server.routes.adapters import router
    from dora_serve.server.state import State

    root = Path(wanted.folder).resolve()
    options = ServerOptions(threads=wanted.threads)
    offer = make_offer(root, wanted.base, False)
    state = State(root, Registry(offer, options), options)
    app = make_app(state, "0.0.0.0", os.environ.get("DORA_SERVE_API_KEY"))
    for route in router.routes:
        own = Route(getattr(route, "path", ""), _refuse, methods=["POST"])
        app.router.routes.insert(0, own)  # before the one that the server has
    return app


async def _refuse(_request: Request) -> Response:
    from dora_serve.server.wire.errors import ApiError

    raise ApiError(
        "What one replica loads, the others do not know: change the folder and deploy again.",
        404,
        code="not_served",
    )
