"""vLLM's answers are those that the embedded server is compared with.

DORA_SERVE_KEEP_ANSWERS=1 writes them anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from dora_serve.vllm.command import find_vllm
from tests.engines.vllm.servers import SMALL, server
from tests.ports import free_port
from tests.server import parity, parity_models, parity_more

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

KEEPS = bool(os.environ.get("DORA_SERVE_KEEP_ANSWERS"))
POOLS = ["--runner", "pooling", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
FLAGS = {
    "decoder": ["--enable-tokenizer-info-endpoint", "--enable-server-load-tracking"],
    "defaults": [],
    "classifier": POOLS,
    "embedder": POOLS,
}


@pytest.fixture(scope="module", params=parity_more.GROUPS)
def group(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """A group of requests, and the address of the vLLM that serves its model."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = parity_models.save(request.param, folder)
    url = f"http://127.0.0.1:{free_port()}"
    words = [*find_vllm(None), "--model", folder / model, "--dtype", "float32"]
    words += SMALL if request.param in ("decoder", "defaults") else ()
    words += ["--served-model-name", model, "--port", url.rsplit(":", 1)[1], *FLAGS[request.param]]
    with server(words, url, folder / "log"):
        yield request.param, url


def ask(url: str, path: str, body: object | None) -> tuple[int, str, str]:
    sent: Any = url + path
    if body is not None:
        kind = {"Content-Type": "application/json"}
        sent = Request(url + path, json.dumps(body).encode(), kind)
    try:
        with urlopen(sent, timeout=300) as answer:
            return answer.status, answer.headers.get("Content-Type", ""), answer.read().decode()
    except HTTPError as error:
        return error.code, "", ""


def keep(file: Path, found: object) -> None:
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


# Only another vLLM answers otherwise than is kept: it is asked by whoever takes one.
@pytest.mark.further
def test_the_kept_answers_are_vllms(group: tuple[str, str]) -> None:
    name, url = group
    if name == "decoder":
        found = {}
        for each, asked in parity.REQUESTS.items():
            status, _, text = ask(url, *asked)
            found[each] = parity.core(status, json.loads(text) if status == 200 else {})
        if KEEPS:
            keep(parity.FILE, found)
        assert found == parity.same(found, parity.answers())
    asked_for = parity_more.GROUPS[name]
    raw = {each: ask(url, *asked) for each, asked in asked_for.items()}
    more = {each: parity_more.told(asked_for[each][0], *said) for each, said in raw.items()}
    if KEEPS:
        keep(parity_more.FILE, {**parity_more.answers(), name: more})
    assert more == parity.same(more, parity_more.answers()[name])
