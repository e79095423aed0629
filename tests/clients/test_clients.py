"""Real clients against a running server, each doing what its users do; `make test-clients`.

Each runs in the environment it needs, which may not be there: then it is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_serve.server.options import ServerOptions
from tests.server.conftest import Server, started
from tests.server.test_structure import MODEL, save_bytes_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLIENTS, VLLM = ROOT / ".venv-clients/bin/python", ROOT / ".venv-vllm/bin/python"
PROGRAMS = {
    "with_openai": Path(sys.executable),
    "with_litellm": CLIENTS,
    "with_langchain": CLIENTS,
    "with_instructor": CLIENTS,
    "with_vllm_bench": VLLM,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("clients")
    save_bytes_model(root / "models" / MODEL)
    with started(root / "models", root, None, ServerOptions(threads=1)) as found:
        yield found


@pytest.mark.parametrize("name", PROGRAMS)
def test_client(running: Server, name: str) -> None:
    python = PROGRAMS[name]
    if shutil.which(str(python)) is None:
        pytest.skip(f"no {python.parents[1].name} here")
    words = [str(python), str(HERE / f"{name}.py"), running.url, MODEL, str(running.root / MODEL)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all fine"
