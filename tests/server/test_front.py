"""The page's files: sent as what they are, and unable to load or run anything of others."""

from __future__ import annotations

import mimetypes

from fastapi import FastAPI
from starlette.testclient import TestClient

from dora_serve.server.routes.front import front


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
