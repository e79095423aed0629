"""The same requests as to vLLM get the same statuses, texts, tokens and log-probabilities."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import parity
from tests.server.conftest import Server, started

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ before }}{{ message.content }}{% endfor %}"
)
ANSWERS = parity.answers()
# What vLLM takes or says otherwise, as docs/server.md says.
OTHERS: dict[str, str] = {}


@pytest.fixture(scope="module")
def alike(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("alike")
    base = shutil.copytree(place / "models" / parity.MODEL, root / parity.MODEL)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    with started(root, place) as running:
        yield running


def test_every_request_was_asked_of_vllm() -> None:
    assert ANSWERS.keys() == parity.REQUESTS.keys()
    assert sum(answer["status"] == 200 for answer in ANSWERS.values()) > 50


@pytest.mark.parametrize("name", [name for name in parity.REQUESTS if name not in OTHERS])
def test_as_vllm(alike: Server, name: str) -> None:
    path, body = parity.REQUESTS[name]
    with alike.http as http:
        answer = http.post(path, json=body)
    found = parity.core(answer.status_code, answer.json() if answer.status_code == 200 else {})
    assert found == parity.same(found, ANSWERS[name]), answer.text


def test_the_answers_are_not_all_alike() -> None:
    """The control: what is asked changes what is written."""
    texts = {name: str(answer.get("choices")) for name, answer in ANSWERS.items()}
    for name in ("presence", "frequency", "repetition", "bias", "allowed", "bad words", "stop"):
        assert texts[name] != texts["plain"]
