"""The same requests as to vLLM get the same statuses, texts, tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import parity, parity_models, parity_more
from tests.server.conftest import Server, started

ANSWERS, MORE = parity.answers(), parity_more.answers()
# What vLLM takes or says otherwise, as docs/server.md says.
WORDS = "a tokenizer of whole words can follow no schema here"
NO_SUCH_PATH = "of a model of another task vLLM says 404"
CUT = "vLLM cuts the vectors of models that say so alone"
OTHERS: dict[str, dict[str, str]] = {
    "decoder": {
        "choice": WORDS,
        "response of a choice": WORDS,
        "a message without content": "refused here",
        "tools by themselves": "vLLM wants flags",
        "response before": "vLLM says 404",
        "response top_logprobs above": "refused here",
        "response of no room": "refused here",
        "embeddings of a decoder": NO_SUCH_PATH,
        "classes of a decoder": NO_SUCH_PATH,
        "scores of a decoder": NO_SUCH_PATH,
        "a ranking of a decoder": NO_SUCH_PATH,
        "pooling of a decoder": NO_SUCH_PATH,
    },
    "classifier": {
        "its embedding": NO_SUCH_PATH,
        "its completion": NO_SUCH_PATH,
        "its score": NO_SUCH_PATH,
    },
    "embedder": {
        "some dimensions": CUT,
        "pooled by tokens": "vLLM wants a flag",
        "its class": NO_SUCH_PATH,
    },
}
# Names in answers that one of the two alone has.
EVERYWHERE = {
    (".system_fingerprint", "vLLM"),
    (".usage.prompt_tokens_details", "here"),
    (".usage.completion_tokens", "here"),
}
FIELDS = {
    "/health": {("", "type")},  # vLLM's says nothing
    "/tokenizer_info": {
        (f".{name}", "vLLM") for name in ("added_tokens_decoder", "name_or_path", "truncation_side")
    },
    "/v1/models": {(".data.permission", "vLLM")},
    "/v1/responses": {
        (".output", "vLLM"),  # of an answer without text
        (".usage.output_tokens_details.tool_output_tokens", "vLLM"),
        *((f".{name}", "here") for name in ("store", "text", "top_logprobs")),
    },
}
GROUPS = ("decoder", "classifier", "embedder")  # in one server; test_defaults.py has the others
ASKED = [(group, name) for group in GROUPS for name in parity_more.GROUPS[group]]


@pytest.fixture(scope="module")
def alike(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("alike")
    for group in GROUPS:
        parity_models.save(group, root)
    parity_models.save_twice(root)
    with started(root, place) as running:
        yield running


def test_every_request_was_asked_of_vllm() -> None:
    assert ANSWERS.keys() == parity.REQUESTS.keys()
    assert sum(answer["status"] == 200 for answer in ANSWERS.values()) > 50
    for group, names in MORE.items():
        assert list(names) == list(parity_more.GROUPS[group])
    assert len(ANSWERS) + sum(map(len, MORE.values())) > 190


@pytest.mark.parametrize("name", parity.REQUESTS)
def test_as_vllm(alike: Server, name: str) -> None:
    path, body = parity.REQUESTS[name]
    with alike.http as http:
        answer = http.post(path, json=body)
    found = parity.core(answer.status_code, answer.json() if answer.status_code == 200 else {})
    assert found == parity.same(found, ANSWERS[name]), answer.text


def asked_alike(server: Server, group: str, name: str) -> None:
    path, body = parity_more.GROUPS[group][name]
    if path == "/v1/responses" and body and body["model"] == parity.MODEL:
        body = {**body, "model": parity_models.TWICE}  # docs/server.md: the second BOS
    sent = f"{path}?model={parity.MODEL}" if path == "/tokenizer_info" else path
    with server.http as http:
        answer = http.get(sent) if body is None else http.post(sent, json=body)
    kind = answer.headers.get("content-type", "")
    found = parity_more.told(path, answer.status_code, kind, answer.text)
    expected = dict(MORE[group][name])
    shapes = [each.pop("shape", None) for each in (expected, found)]
    if name in OTHERS.get(group, {}):
        assert found != parity.same(found, expected), OTHERS[group][name]  # else it is none
        return
    assert found == parity.same(found, expected), answer.text
    assert set(parity_more.unlike(*shapes)) <= FIELDS.get(path, set()) | EVERYWHERE


@pytest.mark.parametrize(("group", "name"), ASKED)
def test_endpoints_as_vllm(alike: Server, group: str, name: str) -> None:
    asked_alike(alike, group, name)


def test_the_answers_are_not_all_alike() -> None:
    """The control: what is asked changes what is written."""
    texts = {name: str(answer.get("choices")) for name, answer in ANSWERS.items()}
    for name in ("presence", "frequency", "repetition", "bias", "allowed", "bad words", "stop"):
        assert texts[name] != texts["plain"]
