"""vLLM's answers are those that the embedded server is compared with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from dora_serve.vllm.command import find_vllm
from tests.conftest import MODELS
from tests.engines.vllm.servers import SMALL, free_port, server
from tests.server import parity

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

# As the embedded server's tests have it, and with a value of the request's own.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ before }}{{ message.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("parity")
    base = shutil.copytree(MODELS / parity.MODEL, folder / parity.MODEL)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    found = f"http://127.0.0.1:{free_port()}"
    words = [*find_vllm(None), "--model", base, "--dtype", "float32", *SMALL]
    words += ["--served-model-name", parity.MODEL, "--port", found.rsplit(":", 1)[1]]
    with server(words, found, folder / "log"):
        yield found


def ask(url: str, path: str, body: object) -> tuple[int, dict[str, object]]:
    sent = Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(sent, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        return error.code, {}


def test_the_kept_answers_are_vllms(url: str) -> None:
    """DORA_SERVE_KEEP_ANSWERS=1 writes them anew."""
    found = {name: parity.core(*ask(url, *asked)) for name, asked in parity.REQUESTS.items()}
    if os.environ.get("DORA_SERVE_KEEP_ANSWERS"):
        parity.FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == parity.same(found, parity.answers())
