"""Whatever the OpenAPI description allows, and what it does not, the server answers without 5xx."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.server.conftest import BASE, DOWN, EMBEDS, SENTIMENT, Server

CHECKS = [not_a_server_error, response_schema_conformance]
NAMES = [BASE, DOWN, SENTIMENT, EMBEDS]
# Of those that few of the models serve, one that does; it is asked more often than the others.
_EMBEDS = (
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/pooling",
    "/v1/embeddings",
)
OWN = {"/classify": SENTIMENT, **dict.fromkeys(_EMBEDS, EMBEDS)}
# Those of models that other tests serve: test_tasks.py and test_hearing.py.
ELSEWHERE = {"/dora/answer", "/v1/audio/transcriptions", "/v1/audio/translations"}
ROUTES = {
    "/v1/completions": 60,
    "/v1/chat/completions": 60,
    "/v1/embeddings": 60,
    "/v1/load_lora_adapter": 20,
    "/v1/unload_lora_adapter": 20,
    "/v1/models": 2,
    "/v1/models/{name}": 20,
    "/dora/models": 2,
    "/classify": 60,
    "/tokenize": 60,
    "/detokenize": 30,
    "/health": 2,
    "/ready": 2,
    "/metrics": 2,
    "/ping": 2,
    "/version": 2,
    "/load": 2,
    "/tokenizer_info": 10,
    "/score": 60,
    "/v1/score": 10,  # the same, by another name
    "/rerank": 60,
    "/v1/rerank": 10,
    "/v2/rerank": 10,
    "/invocations": 120,
    "/v1/responses": 60,
    "/pooling": 60,
}


@cache
def operations(url: str) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    return {operation.path: operation for operation in found}


def test_all_routes_are_described(server: Server) -> None:
    assert set(operations(server.url)) == {*ROUTES, *ELSEWHERE}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.further)])
def test_no_server_error(server: Server, path: str, mode: GenerationMode, times: int) -> None:
    operation = operations(server.url)[path]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("it takes nothing that could be wrong")
    names = [*NAMES, *[OWN[path]] * 4] if path in OWN else NAMES
    # Of many that the description allows few are answered; what it does not allow is refused early.
    asked = ROUTES[path] if mode is GenerationMode.POSITIVE else -(-ROUTES[path] // 2)
    statuses = statuses_of(server, path, mode, names, times * asked)
    if mode is GenerationMode.POSITIVE and "adapter" not in path and "{" not in path:
        assert 200 in statuses  # it got as far as an answer


def statuses_of(
    server: Server, path: str, mode: GenerationMode, names: list[str], examples: int
) -> set[int]:
    """Of the answers to so many requests, each to one of the models `names`."""
    operation, statuses = operations(server.url)[path], set[int]()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), name=st.sampled_from(names))
    def ask(case: Any, name: str) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = name
        if path == "/tokenizer_info":  # a name that is served is not found by chance
            case.query = {"model": name}
        statuses.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

    ask()
    return statuses
