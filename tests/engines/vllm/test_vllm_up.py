"""`dora-serve up --engine vllm`: one server, the base and its runs, through crash and Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import openai
import pytest

from converters.model.base import open_base
from dora_serve.vllm.fleet import Pool
from dora_serve.vllm.up import _Report
from tests.conftest import MODELS
from tests.engines.vllm.servers import (
    BASE,
    DORA_SERVE,
    KEY,
    ask,
    client,
    everyone_is_right,
    ready,
    wait_until,
)

pytest.importorskip("vllm")


@pytest.mark.usefixtures("up")
def test_each_name_gives_its_own_live_runs_tokens(
    url: str, expected: dict[tuple[str, str], list[int]]
) -> None:
    names = {BASE, *(name for name, _ in expected)}
    assert names <= {model.id for model in client(url).models.list()}
    # The control: had one name been served with another's weights, its tokens would tell.
    told = [tuple(expected[name, "count : nine"]) for name in sorted(names)]
    assert len(set(told)) == len(told)
    everyone_is_right(url, expected)


@pytest.mark.usefixtures("up")
def test_the_key_is_asked_for(url: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.usefixtures("up")
def test_the_command_that_is_printed_asks_the_last_adapter(told: Path) -> None:
    wait_until(lambda: "\ncurl " in told.read_text(), 60)
    names, _, command = told.read_text().partition("\ncurl ")
    shell = ["bash", "-c", f"curl --silent --fail {command.splitlines()[0]}"]
    environment = {**os.environ, "DORA_SERVE_API_KEY": KEY}
    answer = json.loads(subprocess.run(shell, env=environment, check=True, stdout=-1).stdout)
    assert answer["model"] == names.splitlines()[-1].strip()
    assert answer["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("base", "task", "path"),
    [
        (BASE, None, "/v1/completions"),
        ("tiny-roberta-base", "sequence-classification", "/classify"),
        ("tiny-roberta-base", "feature-extraction", "/v1/embeddings"),
    ],
)
def test_where_each_task_is_asked_first(
    base: str, task: str | None, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = Pool(base, open_base(MODELS / base), task, {})
    _Report("http://x", pool, [pool.name], key=False)("ready", 1.0)
    assert f"curl http://x{path} -H" in capsys.readouterr().out


def test_a_model_that_chats_is_chatted_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MODELS / BASE, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    pool = Pool("chat", open_base(tmp_path / "chat"), None, {})
    _Report("http://x", pool, [pool.name], key=False)("ready", 1.0)
    assert "curl http://x/v1/chat/completions -H" in capsys.readouterr().out


def test_a_killed_vllm_comes_back_with_the_same_adapters(
    up: subprocess.Popen[bytes], url: str, expected: dict[tuple[str, str], list[int]]
) -> None:
    stop, failed, right = threading.Event(), [0], [0]

    def traffic() -> None:
        while not stop.is_set():
            for pair, tokens in expected.items():
                try:
                    assert ask(url, *pair) == tokens
                    right[0] += 1
                except openai.APIError:
                    failed[0] += 1
                    time.sleep(0.2)

    asking = threading.Thread(target=traffic)
    asking.start()
    before = children(up.pid)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: not ready(url))
    wait_until(lambda: ready(url))
    count = right[0]
    wait_until(lambda: right[0] > count + len(expected))
    stop.set()
    asking.join()
    assert failed[0] > 0, "the traffic never met the crash"
    assert not any(alive(pid) for pid in before), "processes of the killed server are left"
    everyone_is_right(url, expected)


def test_ctrl_c_leaves_nothing_behind(up: subprocess.Popen[bytes], url: str) -> None:
    below = children(up.pid)
    assert len(below) > 1
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=60) == 0
    assert not any(alive(pid) for pid in below)
    assert not ready(url)


def children(pid: int) -> list[int]:
    """All processes below `pid`, its own children first."""
    import psutil

    process = psutil.Process(pid)
    direct = [child.pid for child in process.children()]
    return direct + [c.pid for c in process.children(recursive=True) if c.pid not in direct]


def alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_cannot_start_says_why(folder: Path) -> None:
    words = [DORA_SERVE, "up", folder, "--engine", "vllm", "--", "--max-model-len", "100000"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    assert "the server ended before it was ready" in done.stderr
    assert "max_model_len" in done.stderr
    assert "Traceback" not in done.stderr
