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
NODE = ROOT / ".venv-clients/node/node_modules"
PROGRAMS = {
    "with_openai.py": Path(sys.executable),
    "with_litellm.py": CLIENTS,
    "with_langchain.py": CLIENTS,
    "with_instructor.py": CLIENTS,
    "with_llm.py": CLIENTS,
    "with_prometheus.py": CLIENTS,
    "with_guidellm.py": CLIENTS,
    "with_openai.mjs": NODE / "openai",
    "with_vllm_bench.py": VLLM,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("clients")
    save_bytes_model(root / "models" / MODEL)
    with started(root / "models", root, None, ServerOptions(threads=1)) as found:
        yield found


@pytest.mark.parametrize("name", PROGRAMS)
def test_client(running: Server, name: str) -> None:
    program, script = PROGRAMS[name], str(HERE / name)
    if not program.exists():
        pytest.skip(f"no {program.relative_to(ROOT).parts[0]} here")
    asked = [running.url, MODEL, str(running.root / MODEL)]
    words = [str(program), script, *asked]
    if name.endswith(".mjs"):
        words = [shutil.which("node") or "node", script, str(NODE), *asked]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all fine"
