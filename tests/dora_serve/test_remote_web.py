"""Inputs at a web server, and what lies on this machine given as a URL."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converters.certificate import FILE
from converters.errors import OutputError
from dora_serve.remote.local import fetched

from .exporting import bad, good
from .following import answering

EXPORT = Path(sys.executable).parent / "dora-export"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Before = Callable[[SimpleHTTPRequestHandler], object]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(llama_lora: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_lora, tmp_path / "web" / "run")


@contextmanager
def serving(folder: Path, before: Before = lambda _request: None, etag: str = "") -> Iterator[str]:
    """The URL of a web server of `folder`; `before` is called before a file is sent, and
    returns whether it has answered."""

    class Answer(SimpleHTTPRequestHandler):
        def __init__(self, *words: object) -> None:
            super().__init__(*words, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if not before(self):
                super().do_GET()

        def end_headers(self) -> None:
            if etag:
                self.send_header("ETag", f'"{etag}"')
            super().end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    with answering(Answer) as url:
        yield url


def copy_of(url: str) -> dict[str, bytes]:
    with fetched(url, lambda *_: nullcontext(lambda _count: None)) as path:
        return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*.*")}


def test_a_run_that_changes_while_a_web_server_sends_it(run: Path, cache: Path) -> None:
    """A listing has names alone; the configuration of one run came with the weights of another."""

    def change(request: SimpleHTTPRequestHandler) -> None:
        if request.path.endswith(WEIGHTS):
            tensors = {name: tensor * 2 for name, tensor in load_file(run / WEIGHTS).items()}
            time.sleep(1.1)  # the server's dates are whole seconds
            save_file(tensors, run / WEIGHTS, {"format": "pt"})

    with serving(run.parent, change) as url, pytest.raises(OutputError, match="changed while they"):
        copy_of(f"{url}/run")
    assert not list(cache.glob("*remote-*"))


def test_a_file_that_came_in_part(run: Path) -> None:
    def cut(request: SimpleHTTPRequestHandler) -> None:
        if request.path.endswith(WEIGHTS):
            request.protocol_version = "HTTP/1.0"  # its end is that of the connection
            request.send_response_only(200)
            request.flush_headers()
            request.wfile.write(b"\r\n" + (run / WEIGHTS).read_bytes()[:-8])
            request.wfile.flush()
            request.connection.close()

    with serving(run.parent, cut) as url:
        assert "did not arrive whole" in bad("inspect", f"{url}/run")


def test_what_a_web_server_tells_versions_of_is_fetched_once(run: Path, cache: Path) -> None:
    came: list[str] = []
    with serving(run.parent, lambda request: came.append(request.path), etag="v1") as url:
        first = copy_of(f"{url}/run")
        assert f"/run/{WEIGHTS}" in came
        came.clear()
        assert copy_of(f"{url}/run") == first
        assert f"/run/{WEIGHTS}" not in came
    assert len(list(cache.glob("remote-*"))) == 1


def listing(page: str, status: int = 200) -> Before:
    """What answers any folder below the run with `page`, before all others."""

    def answer(request: SimpleHTTPRequestHandler) -> bool:
        below = request.path.startswith("/run/more")
        if below:
            request.send_response_only(status)
            request.send_header("Content-Type", "text/html")
            request.end_headers()
            request.wfile.write(page.encode())
        return below

    return answer


def test_a_web_server_that_lists_without_end(run: Path) -> None:
    """It was followed until Python's recursion ended; of ten such folders, never."""
    (run / "more").mkdir()
    with serving(run.parent, listing("".join(f'<a href="{n}/">' for n in range(10)))) as url:
        assert "more folders than a model has" in bad("inspect", f"{url}/run")


def test_a_list_without_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was read into memory."""
    monkeypatch.setattr("dora_serve.remote.page._LARGEST", 1 << 20)

    def before(request: SimpleHTTPRequestHandler) -> bool:
        if request.path.rstrip("/") != "/run":
            return False
        request.send_response(200)
        request.send_header("Content-Type", "text/html")
        request.end_headers()
        with suppress(ConnectionError):
            while True:
                request.wfile.write(b'<a href="x">x</a>' * 1000)
        return True

    with serving(run.parent, before) as url:
        assert "the list of a folder has over" in bad("inspect", f"{url}/run")


def test_a_folder_that_lists_itself(run: Path) -> None:
    (run / "more").mkdir()
    own = '<a href="./">.</a><a href="../">..</a><a href="/run/more/">more</a>'
    with serving(run.parent, listing(own)) as url:
        assert copy_of(f"{url}/run").keys() >= {CONFIG, WEIGHTS}


def test_a_page_that_is_refused_leaves_nothing_out(run: Path) -> None:
    """The copy was made without what lies there, and nobody was told."""
    (run / "more").mkdir()
    (run / "more" / "x.json").write_text("{}")
    for status in (503, 403, 404):
        with serving(run.parent, listing("", status)) as url:
            assert "list" in bad("inspect", f"{url}/run")


def test_names_are_those_of_files(run: Path) -> None:
    (run / "a b=\u00e9.txt").write_text("odd")
    with serving(run.parent) as url:
        assert copy_of(f"{url}/run")["a b=\u00e9.txt"] == b"odd"


@pytest.mark.parametrize("name", ["..%2F..%2Fup.txt", "%2e%2e", "a%2F%2Fb"])
def test_names_that_lead_out(run: Path, name: str, tmp_path: Path) -> None:
    (run / "index.html").write_text(f'<a href="{name}">x</a>')
    with serving(run.parent) as url:
        said = bad("inspect", f"{url}/run")
    assert "lead out of the folder" in said or "nothing at this URL" in said
    assert not list(tmp_path.rglob("up.txt"))


def test_a_download_may_take_longer_than_five_minutes() -> None:
    """What fsspec leaves to aiohttp, which ends every transfer then."""
    from dora_serve.remote.store import Store

    timeout = Store("http://127.0.0.1:9/run")._files.client_kwargs["timeout"]
    assert timeout.total is None
    assert timeout.sock_read is not None


def test_a_copy_larger_than_the_disk_is_not_begun(run: Path) -> None:
    def nothing_else(request: SimpleHTTPRequestHandler) -> None:
        assert not request.path.endswith("huge.bin")

    with (run / "huge.bin").open("wb") as stream:
        stream.truncate(1 << 43)
    with serving(run.parent, nothing_else) as url:
        assert "not enough space" in bad("inspect", f"{url}/run")


@pytest.mark.parametrize(
    "ended",
    [
        signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.further) for n in (signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_a_copy_goes_with_its_command(
    run: Path, cache: Path, llama_base: Path, tmp_path: Path, ended: signal.Signals
) -> None:
    """The command waits for the second of two folders, while the copy of the first is there."""
    holding, release = threading.Event(), threading.Event()
    sent = []

    def hold(request: SimpleHTTPRequestHandler) -> None:
        if request.path.endswith("model.safetensors"):
            sent.append(request.path)
            if len(sent) == 2:
                holding.set()
                release.wait(60)

    shutil.copytree(llama_base, run.parent / "base")
    with serving(run.parent, hold) as url:
        words = ("adapter", f"{url}/run", str(tmp_path / "out"), "--base", f"{url}/base")
        with subprocess.Popen([EXPORT, *words], stderr=subprocess.DEVNULL) as process:
            assert holding.wait(100)
            assert [*cache.rglob("*model.safetensors")]
            process.send_signal(ended)
            assert process.wait(60) != 0
        release.set()
    end = time.monotonic() + 30
    while [*cache.rglob("*model.safetensors")] and time.monotonic() < end:
        time.sleep(0.05)
    assert not [*cache.rglob("*model.safetensors")]
    assert not (tmp_path / "out").exists()


def test_what_lies_here_is_no_copy(run: Path, llama_base: Path, tmp_path: Path) -> None:
    """It was, and so `--force` replaced the input by what was made of it."""
    ours, url = tmp_path / "ours", f"file://{tmp_path}/ours"
    good("adapter", f"file://{run}", ours, "--base", f"file://{llama_base}")
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    for out in (ours, ours / "inner", tmp_path):
        assert "inside an input" in bad("adapter", url, out, "--force", "--target", "vllm")
    page = run / CONFIG
    config = page.read_bytes()
    assert "input" in bad("inspect", f"file://{run}", "--html", page, "--force")
    assert page.read_bytes() == config
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before
    assert FILE in before
    assert "nothing at this URL" in bad("inspect", f"file://{tmp_path}/none")
