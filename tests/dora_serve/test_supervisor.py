"""A server that is kept running, with a small real one: crash, refusal, signals, orphans."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

from dora_serve.vllm.desired import Following
from tests.processes import commands

# Serves 200 on any path after a child of its own has started; refuses to start when told so.
SERVER = """
import http.server, pathlib, subprocess, sys, threading, time
port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
if (folder / "refuse").exists():
    sys.exit("Error: told to refuse")
with (folder / "starts").open("a") as starts:
    starts.write("x")
from multiprocessing.resource_tracker import getfd
from multiprocessing.shared_memory import SharedMemory
shared = SharedMemory(create=True, size=8)
with (folder / "shared").open("a") as names:
    print(shared.name, file=names)
child = subprocess.Popen(["sleep", "600"], pass_fds=[getfd()])  # as a process of multiprocessing
(folder / "child").write_text(str(child.pid))
class Ok(http.server.BaseHTTPRequestHandler):
    answer = 200
    def do_GET(self):
        self.send_response(Ok.answer); self.end_headers()
        if self.path == "/exit":
            import os; os._exit(3)
        if self.path == "/broken":
            Ok.answer = 503
        if self.path == "/deaf":
            threading.Thread(target=server.shutdown).start()
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Ok)
server.serve_forever()
server.server_close()
time.sleep(600)
"""
SUPERVISE = """
import sys
from pathlib import Path
from converters.errors import DoraExportError
from dora_serve.vllm import supervisor
from dora_serve.vllm.supervisor import Supervisor
supervisor._LOOK, supervisor._GONE = 0.5, 2
port, folder, server = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
said = (folder / "events").open("a", buffering=1)
try:
    Supervisor(
        [sys.executable, "-c", server, port, str(folder)], {}, f"http://127.0.0.1:{port}/health",
        folder / "log", lambda event, seconds: event != "starting" and print(event, file=said),
    ).run()
except DoraExportError as error:
    sys.exit(str(error))
"""


class Supervised:
    def __init__(self, folder: Path, start: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        if start:
            self.start()

    def start(self, **environment: str) -> None:
        words = [sys.executable, "-c", SUPERVISE, str(self.port), str(self.folder), SERVER]
        env = {**os.environ, **environment}
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)

    def events(self) -> list[str]:
        path = self.folder / "events"
        return path.read_text().split() if path.exists() else []

    def ask(self, path: str) -> None:
        try:
            urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5).close()
        except OSError:
            assert path == "/exit"

    def child(self) -> int:
        return int((self.folder / "child").read_text())

    def shared(self) -> list[str]:
        """What is left of the shared memory of all starts."""
        names = (self.folder / "shared").read_text().split()
        assert names
        return [name for name in names if Path("/dev/shm", name).exists()]


@pytest.fixture
def supervised(tmp_path: Path) -> Supervised:
    return Supervised(tmp_path)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def answers(port: int) -> bool:
    try:
        urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
    except OSError:
        return False
    return True


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_crash_is_mended_and_ctrl_c_ends_all(supervised: Supervised) -> None:
    until(lambda: supervised.events() == ["ready"])
    first = supervised.child()
    supervised.ask("/exit")
    until(lambda: supervised.events() == ["ready", "crashed", "ready"])
    assert not alive(first), "what the crashed server had started is left"
    supervised.ask("/health")
    second = supervised.child()
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.process.wait(timeout=30) == 0
    assert not alive(second)
    assert supervised.events()[-1] == "stopping"
    assert (supervised.folder / "starts").read_text() == "xx"
    assert not supervised.shared()


@pytest.mark.parametrize("path", ["/broken", "/deaf"])
def test_what_neither_ends_nor_serves_is_started_again(supervised: Supervised, path: str) -> None:
    """As vLLM does whose engine died while requests waited for it."""
    until(lambda: supervised.events() == ["ready"])
    supervised.ask(path)
    until(lambda: supervised.events() == ["ready", "crashed", "ready"])
    assert (supervised.folder / "starts").read_text() == "xx"
    supervised.process.terminate()
    assert supervised.process.wait(timeout=30) == 0
    assert not supervised.shared()


def test_a_first_start_that_fails_is_an_error_with_the_servers_words(tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    supervised = Supervised(tmp_path)
    assert supervised.process.wait(timeout=30) == 1
    assert supervised.process.stderr is not None
    told = supervised.process.stderr.read()
    assert "the server ended before it was ready" in told
    assert "told to refuse" in told
    assert "Traceback" not in told


def test_a_port_where_another_server_answers_is_refused(tmp_path: Path) -> None:
    """Else its answers pass for those of the server, which cannot start."""
    words = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory"]
    supervised = Supervised(tmp_path, start=False)
    (tmp_path / "health").touch()
    with subprocess.Popen(
        [*words, str(tmp_path), str(supervised.port)], stderr=subprocess.DEVNULL
    ) as other:
        try:
            until(lambda: answers(supervised.port))
            supervised.start()
            assert supervised.process.wait(timeout=30) == 1
            assert supervised.process.stderr is not None
            told = supervised.process.stderr.read()
        finally:
            supervised.process.kill()
            other.kill()
    assert f"port {supervised.port} of 127.0.0.1" in told
    assert "--port" in told
    assert supervised.events() == []
    assert not (tmp_path / "starts").exists()


def test_the_server_is_not_asked_through_a_proxy(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, start=False)
    supervised.start(http_proxy="http://127.0.0.1:9", no_proxy="")
    try:
        until(lambda: supervised.events() == ["ready"])
    finally:
        supervised.process.send_signal(signal.SIGINT)
        assert supervised.process.wait(timeout=30) == 0


def test_a_supervisor_that_is_killed_takes_the_server_along(supervised: Supervised) -> None:
    until(lambda: supervised.events() == ["ready"])
    supervised.process.kill()
    supervised.process.wait()

    until(lambda: not answers(supervised.port))
    os.kill(supervised.child(), signal.SIGKILL)  # of a server that does not end its own children


def test_what_a_later_start_serves_is_told(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """And the base by the name that the user gave it, and no run by one that another had."""
    root, folder = tmp_path / "models", tmp_path / "server"
    folder.mkdir()
    shutil.copytree(llama_base, root / "base")
    server, asked = folder / "vllm", Supervised(folder, start=False)
    server.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"sys.argv = ['', {str(asked.port)!r}, {str(folder)!r}]\n{SERVER}"
    )
    server.chmod(0o755)
    words = ["up", root, "--engine", "vllm", "--vllm", server, "--port", asked.port]
    words += ["--live", "--", "--served-model-name", "first", "second"]
    told = folder / "told"
    with told.open("w") as out:
        command = [str(commands() / "dora-serve"), *map(str, words)]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        until(lambda: "curl" in told.read_text())
        assert "  first\n  second\n" in told.read_text()
        shutil.copytree(llama_lora, root / "later")
        before = len(told.read_text())
        asked.ask("/exit")
        until(lambda: "curl" in told.read_text()[before:])
        assert "  first\n  second\n  later\n" in told.read_text()[before:]
        shutil.copytree(llama_lora, root / "below" / "later")
        assert "below/later" in Following(root).all()
        shutil.rmtree(root / "later")
        before = len(told.read_text())
        asked.ask("/exit")
        until(lambda: "curl" in told.read_text()[before:])
        assert "  first\n  second\n  below/later\n" in told.read_text()[before:]
    finally:
        process.terminate()
        process.wait(timeout=30)
