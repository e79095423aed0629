"""The smaller endpoints: nearness of texts, one route for all requests, and what the server is."""

from __future__ import annotations

import base64
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dora_serve.server.routes.encoding import shortened
from dora_serve.server.wire.requests import EmbeddingRequest
from tests.conftest import MODELS
from tests.server.conftest import BASE, DOWN, EMBEDS, SENTIMENT, TEMPLATE, Server

TEXTS = ["good film", "bad", "a dull and bad film"]


def ask(server: Server, path: str, body: dict[str, Any]) -> Any:
    with server.http as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def vectors(server: Server) -> np.ndarray:
    told = ask(server, "/v1/embeddings", {"model": EMBEDS, "input": TEXTS})
    return np.array([row["embedding"] for row in told["data"]])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")],
)
def test_scores_are_cosines(server: Server, vectors: np.ndarray, one: str, other: str) -> None:
    body = {"model": EMBEDS, one: TEXTS[0], other: TEXTS}
    scores = [each["score"] for each in ask(server, "/score", body)["data"]]
    assert scores == pytest.approx([cosine(vectors[0], each) for each in vectors], abs=1e-5)
    assert scores[0] == pytest.approx(1)
    pairs = {"model": EMBEDS, one: TEXTS, other: TEXTS[::-1]}
    told = [each["score"] for each in ask(server, "/v1/score", pairs)["data"]]
    assert told == pytest.approx(
        [cosine(*pair) for pair in zip(vectors, vectors[::-1], strict=True)], abs=1e-5
    )


def test_the_nearest_document_comes_first(server: Server, vectors: np.ndarray) -> None:
    body = {"model": EMBEDS, "query": TEXTS[2], "documents": TEXTS}
    results = ask(server, "/v1/rerank", body)["results"]
    near = [cosine(vectors[2], each) for each in vectors]
    assert [each["index"] for each in results] == np.argsort(-np.array(near)).tolist()
    assert results[0] == {
        "index": 2, "document": {"text": TEXTS[2]}, "relevance_score": pytest.approx(1),
    }  # fmt: skip
    first = ask(server, "/rerank", {**body, "top_n": 1})["results"]
    assert [each["index"] for each in first] == [2]


def test_some_dimensions(server: Server, vectors: np.ndarray) -> None:
    body = {"model": EMBEDS, "input": TEXTS[0], "dimensions": 5}
    (row,) = ask(server, "/v1/embeddings", body)["data"]
    assert row["embedding"] == pytest.approx(vectors[0][:5].tolist(), abs=1e-6)
    packed = {**body, "encoding_format": "base64", "use_activation": True}
    (row,) = ask(server, "/v1/embeddings", packed)["data"]
    found = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
    assert found == pytest.approx(vectors[0][:5] / np.linalg.norm(vectors[0][:5]), abs=1e-6)
    with server.http as http:
        answer = http.post("/v1/embeddings", json={**body, "dimensions": 33})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dimensions")


def test_logits_in_place_of_probabilities(server: Server) -> None:
    body = {"model": SENTIMENT, "input": TEXTS[0]}
    (soft,) = ask(server, "/classify", body)["data"]
    (raw,) = ask(server, "/classify", {**body, "use_activation": False})["data"]
    powers = np.exp(raw["probs"])
    assert soft["probs"] == pytest.approx((powers / powers.sum()).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": DOWN, "prompt": "count : nine", "temperature": 0}),
        (
            "/v1/chat/completions",
            {"model": DOWN, "messages": [{"role": "user", "content": "cat"}], "temperature": 0},
        ),
        ("/v1/embeddings", {"model": EMBEDS, "input": "good film"}),
        ("/classify", {"model": SENTIMENT, "input": "good film"}),
        ("/score", {"model": EMBEDS, "text_1": "good", "text_2": "bad"}),
        ("/rerank", {"model": EMBEDS, "query": "good", "documents": ["bad", "good film"]}),
    ],
)
def test_invocations_are_those_of_other_routes(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    told = [ask(server, each, body) for each in (path, "/invocations")]
    for each in told:
        each.pop("id")
        each.pop("created", None)
    assert told[0] == told[1]


def test_an_invocation_that_no_class_can_be_told_of(server: Server) -> None:
    with server.http as http:
        answer = http.post("/invocations", json={"model": SENTIMENT, "input": "a", "dimensions": 2})
    assert answer.status_code == 400, answer.text


def test_what_the_server_is(server: Server) -> None:
    with server.http as http:
        assert http.get("/ping").status_code == http.post("/ping").status_code == 200
        assert http.get("/version").json() == {"version": version("dora-serve")}
        assert http.get("/load").json() == {"server_load": 0}
        assert http.get("/tokenizer_info").status_code == 400
        told = http.get("/tokenizer_info", params={"model": DOWN}).json()
        assert told["eos_token"] == "</s>"
        assert told["tokenizer_class"]
        assert told["chat_template"] == TEMPLATE
        assert http.get("/tokenizer_info", params={"model": "none"}).status_code == 404
    assert (MODELS / BASE / "tokenizer_config.json").exists()


def test_prometheus_reads_the_metrics(server: Server) -> None:
    ask(server, "/v1/completions", {"model": DOWN, "prompt": "cat", "max_tokens": 3})
    with server.http as http:
        answer = http.get("/metrics", headers={"Accept": "text/plain;version=0.0.4"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    kinds = {
        "vllm:generation_tokens": "counter",
        "vllm:num_requests_running": "gauge",
        "vllm:time_to_first_token_seconds": "histogram",
    }
    assert {name: families[name].type for name in kinds} == kinds
    samples = families["vllm:generation_tokens"].samples
    counted = {sample.labels["model_name"]: sample.value for sample in samples}
    assert counted[DOWN] >= 1


@pytest.mark.parametrize(
    ("ends", "asked", "length"),
    [(True, None, 1), (True, False, 5), (False, None, 5), (False, True, 1)],
)
def test_a_pipeline_that_normalizes(ends: bool, asked: bool | None, length: int) -> None:
    """What is asked comes before what the model's folder says, and after the cut."""
    body = EmbeddingRequest(model="m", input="a", use_activation=asked, dimensions=2)
    found = shortened(np.array([3, 4, 100], np.float32), body, ends)
    assert np.linalg.norm(found) == pytest.approx(length)
