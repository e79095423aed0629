"""One server for all tests, in a process of its own, on a copy of the sample models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI
from safetensors.torch import save_file
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from dora_serve.onnxruntime.limits import Limits
from dora_serve.server.options import ServerOptions
from tests.conftest import MODELS
from tests.ports import free_port
from tests.processes import commands

DOWN, SECOND = "Tiny_Llama--Count_Down--1", "Tiny_Llama--Every_Second--1"
BASE, SENTIMENT, EMBEDS = "tiny-llama-base", "Tiny_Roberta--Sentiment--1", "tiny-embedder"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ message.content }}{% endfor %}"
)
_START = """
import json, sys
from pathlib import Path
from dora_serve.onnxruntime.limits import Limits
from dora_serve.server.options import ServerOptions
from dora_serve.server.bounded import process
from dora_serve.server.prepare import child
from dora_serve.server.up import up
from types import SimpleNamespace
root, port, key, options, python, impatient = json.loads(sys.argv[1])
child.sys = SimpleNamespace(executable=python)
process.sys = SimpleNamespace(executable=impatient)
limits = Limits(**options.pop("limits"))
options = ServerOptions(**options, limits=limits)
raise SystemExit(up(Path(root), None, "127.0.0.1", port, key, False, options))
"""
# Python, for a bounded process: of the seconds that a call may take of the processor one is left,
# as many attacks use up all. test_tokenizing.py has what it is in earnest.
_IMPATIENT = """#!{python}
import resource, runpy, sys
def sooner(kind, bounds, real=resource.setrlimit):
    real(kind, (bounds[0] - 4, bounds[1]) if kind == resource.RLIMIT_CPU else bounds)
resource.setrlimit = sooner
_, _, name, *sys.argv[1:] = sys.argv
runpy.run_module(name, run_name="__main__")
"""


@dataclass
class Server:
    """A running server. `log`: what it prints."""

    url: str
    root: Path
    process: subprocess.Popen[bytes]
    log: Path
    key: str | None

    @property
    def http(self) -> httpx.Client:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def rss(self) -> int:
        """Bytes of memory it has."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def save_adapter(folder: Path) -> None:
    """One of the decoder, as PEFT saves it."""
    folder.mkdir(parents=True)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    torch.manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(64, 2)}
    tensors = {f"{name}.{part}.weight": factor for part, factor in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@contextmanager
def started(
    root: Path,
    folder: Path,
    key: str | None = None,
    options: ServerOptions | None = None,
    forked: bool = True,
    errors: int | None = None,
) -> Iterator[Server]:
    """A server of `root`; `folder` is for its log, and its cache unless the environment has one.
    `forked`: the process that prepares for it is forked, and not one below it. `errors`: the file
    that its standard error is, None for its log."""
    options = options or ServerOptions(threads=2)
    port = free_port()
    log = folder / f"log-{port}"
    python = str(commands() / "python") if forked else sys.executable
    impatient = folder / f"impatient-{port}"
    impatient.write_text(_IMPATIENT.format(python=sys.executable))
    impatient.chmod(0o755)
    arguments = json.dumps([str(root), port, key, asdict(options), python, str(impatient)])
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, arguments],
            stdout=stream,
            stderr=stream if errors is None else errors,
            env={"DORA_SERVE_CACHE": str(folder / "cache"), **os.environ},
        )
    server = Server(f"http://127.0.0.1:{port}", root, process, log, key)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def _wait(server: Server) -> None:
    with httpx.Client(base_url=server.url) as http:
        for _ in range(3600):
            assert server.process.poll() is None, server.log.read_text()
            with suppress(httpx.TransportError):
                if http.get("/ready").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(server.log.read_text())


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `models` are the samples with a chat template, and an embedder."""
    folder = tmp_path_factory.mktemp("server")
    root = folder / "models"
    shutil.copytree(MODELS, root)
    (root / BASE / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**shape, vocab_size=36, intermediate_size=48, max_position_embeddings=34)
    RobertaModel(config).save_pretrained(root / EMBEDS)
    AutoTokenizer.from_pretrained(MODELS / "tiny-roberta-base").save_pretrained(root / EMBEDS)
    return folder


@pytest.fixture(scope="session")
def server(place: Path) -> Iterator[Server]:
    with started(place / "models", place) as running:
        yield running


@pytest.fixture(scope="session")
def narrow(place: Path, server: Server) -> Iterator[Server]:
    """A server with room for little, and a key."""
    limits = Limits(max_rows=2, max_waiting=4, piece=8)
    options = ServerOptions(threads=1, max_body=64 << 10, timeout=20, limits=limits)
    assert server.process.poll() is None  # what it converted is in the cache
    with started(place / "models", place, "secret", options) as running:
        yield running
