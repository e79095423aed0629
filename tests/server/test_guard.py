"""What the log and the counters tell of a request that a bug ended."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest
from fastapi import FastAPI

from dora_serve.server.guard import Guard
from dora_serve.server.metrics import Metrics
from dora_serve.server.wire import errors


def test_a_bug_is_logged_and_counted_as_what_the_client_gets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, metrics = FastAPI(), Metrics()

    @app.get("/bug")
    def bug() -> None:
        raise KeyError("a bug")

    errors.install(app)
    app.add_middleware(
        Guard, api_key=None, max_body=100, local=False, page=frozenset(), metrics=metrics
    )

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/bug")

    caplog.set_level(logging.INFO, "dora_serve.requests")
    assert asyncio.run(ask()).status_code == 500
    told = [json.loads(r.message) for r in caplog.records if r.name == "dora_serve.requests"]
    assert [(each["path"], each["status"]) for each in told] == [("/bug", 500)]
    (counted,) = metrics.refused.collect()
    counts = {s.labels["status"]: s.value for s in counted.samples if s.name.endswith("_total")}
    assert counts == {"500": 1.0}
