"""One real vLLM server for the session, started by `dora-serve up`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_serve.proof.vllm import greedy
from tests.conftest import MODELS, randomize
from tests.converters.test_adalora import train
from tests.engines.vllm.servers import (
    AT_START,
    BASE,
    DORA_SERVE,
    KEY,
    SMALL,
    TOLD,
    live_tokens,
    runs,
    server,
)
from tests.ports import free_port


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two DoRA runs, an AdaLoRA run and one of an odd name, as training left them."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(MODELS / BASE, root / BASE)
    others = shutil.ignore_patterns("Tiny_Roberta")
    shutil.copytree(MODELS / "runs", root / "runs", ignore=others)
    base = AutoModelForCausalLM.from_pretrained(root / BASE)
    train(base, root / "ada", True, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    base = AutoModelForCausalLM.from_pretrained(root / BASE)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(root / AT_START)
    return root


@pytest.fixture(scope="session")
def url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `up` prints."""
    return tmp_path_factory.mktemp("log") / "up.log"


@pytest.fixture(scope="session")
def up(folder: Path, url: str, cache: Path, told: Path) -> Iterator[subprocess.Popen[bytes]]:
    port = url.rsplit(":", 1)[1]
    words = [DORA_SERVE, "up", folder, "--engine", "vllm", "--live"]
    words += ["--port", port, "--", *SMALL]
    env = {"DORA_SERVE_CACHE": str(cache), "DORA_SERVE_API_KEY": KEY}
    with server(words, url, told, **env) as process:
        yield process


@pytest.fixture(scope="session")
def expected(folder: Path) -> dict[tuple[str, str], list[int]]:
    """(model, prompt) → the tokens of the live run, or of the base."""
    words = AutoTokenizer.from_pretrained(folder / BASE)
    base = AutoModelForCausalLM.from_pretrained(folder / BASE).eval()
    found = {}
    for prompt, count in TOLD.items():
        ids = words(prompt)["input_ids"]
        found[BASE, prompt] = greedy(base, ids, count)
        for name, run in runs(folder).items():
            found[name, prompt] = live_tokens(run, folder / BASE, ids, count)
    return found
