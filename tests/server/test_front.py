"""The page's files: sent as what they are, and unable to load or run anything of others; and what
describes the API."""

from __future__ import annotations

import asyncio
import mimetypes
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from dora_serve.server.app import make_app
from dora_serve.server.options import ServerOptions
from dora_serve.server.prepare.offer import Offer
from dora_serve.server.registry import Registry
from dora_serve.server.routes.front import front
from dora_serve.server.state import State


def test_every_file_of_the_page() -> None:
    router, paths = front()
    app = FastAPI()
    app.include_router(router)
    client = TestClient(app)
    assert "/" in paths and len(paths) > 2
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 200 and answer.content
        kind = mimetypes.guess_type(path if path != "/" else "index.html")[0]
        assert answer.headers["Content-Type"].partition(";")[0] == kind
        rules = answer.headers["Content-Security-Policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= {*rules}
        assert not any("unsafe" in rule or "*" in rule for rule in rules)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-cache"
    assert client.get("/index.html").status_code == 404


def test_the_api_is_described_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time that takes a second or two, in which others are answered."""
    options = ServerOptions()
    offer = Offer(graphs=[], models=[], problems={})
    app = make_app(State(Path(), Registry(offer, options), options), "127.0.0.1", None)
    describe = app.openapi

    def beside() -> dict[str, Any]:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return describe()

    monkeypatch.setattr(app, "openapi", beside)
    with TestClient(app, "http://127.0.0.1") as http:
        described = http.get("/openapi.json").json()
    assert "/v1/completions" in described["paths"] and "/openapi.json" not in described["paths"]
