"""Folders of many, and of odd things, that are followed; servers that answer no vLLM's answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save, save_file

from converters.errors import MissingError
from converters.model.base import open_base
from dora_serve.commands import dora_serve as main
from dora_serve.folder import inventory
from dora_serve.vllm import desired as module
from dora_serve.vllm.desired import SETTLE, Desired, Following
from dora_serve.vllm.kept_names import links
from dora_serve.vllm.watch import Server, reconcile

from .following import answering

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path, llama_base: Path, llama_lora: Path) -> Path:
    shutil.copytree(llama_base, tmp_path / "root" / "base")
    shutil.copytree(llama_lora, tmp_path / "root" / "run")
    return tmp_path / "root"


class Clock:
    """Time that passes where it is said."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A folder through which looking takes ten seconds."""
    clock, things_below = Clock(), inventory.things_below

    def walk(*words: Any) -> Iterator[tuple[Path, str]]:
        clock.now += 10
        return things_below(*words)

    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "things_below", walk)
    return clock


def test_of_thousands_more_than_one_is_read_a_look(root: Path, slow: Clock) -> None:
    for number in range(4):
        shutil.copytree(root / "run", root / f"run-{number}")
    following = Following(root)
    following.look()
    slow.sleep(1)
    assert len(following.look().adapters) == 5


def read_in(following: Following, clock: Clock, seconds: float) -> Following:
    """Let every reading of a run take so long."""
    renew = following.renew

    def slowly(name: str) -> object:
        clock.now += seconds
        return renew(name)

    following.renew = slowly  # type: ignore[method-assign, assignment]
    return following


def test_once_waits_for_all_that_can_be_read(root: Path, slow: Clock) -> None:
    """And not a minute for whatever there is."""
    for number in range(4):
        shutil.copytree(root / "run", root / f"run-{number}")
    assert len(read_in(Following(root), slow, 45.0).at_rest().adapters) == 5


def test_once_fails_where_something_is_being_written(root: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.05):
            with (root / "run" / "log").open("a") as stream:
                stream.write("more")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch, serving(b'{"data": []}') as url:
            patch.setattr(module, "PATIENCE", 2.0)
            done = CliRunner().invoke(main, ["watch", str(root), "--once", "--server", url])
    finally:
        stop.set()
        thread.join()
    assert done.exit_code == 1
    assert "left out: run: the run is being written" in done.output


def test_a_link_to_itself_in_a_run_hides_no_change(root: Path) -> None:
    """What the folder lists behind it was not looked at."""
    for number in range(30):
        (root / "run" / str(number)).symlink_to(str(number))
    following = Following(root)
    before = following.at_rest().adapters["run"]
    weights = root / "run" / WEIGHTS
    save_file({n: t * 2 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    (root / "run" / CONFIG).write_text((root / "run" / CONFIG).read_text() + " ")
    assert following.at_rest().adapters["run"] != before


def test_who_follows_the_same_folder_has_the_same_names(root: Path, llama_lora: Path) -> None:
    """Whoever sees what first: names that differ were taken from one server by the other."""
    one, other = Following(root), Following(root)
    shutil.copytree(llama_lora, root / "a" / "new")
    assert set(one.at_rest().adapters) == {"run", "new"}
    shutil.copytree(llama_lora, root / "b" / "new")
    names = {"run", "new", "b/new"}
    assert set(other.at_rest().adapters) == names
    assert set(one.at_rest().adapters) == names
    assert set(Following(root).at_rest().adapters) == names


def test_a_name_that_another_gave_to_what_is_not_found_yet(root: Path, llama_lora: Path) -> None:
    one, other = Following(root), Following(root)
    one.at_rest()
    shutil.copytree(llama_lora, root / "a" / "new")
    found = one._names.of(root, [root / "run"], {root / "run": "run"}, ())  # looked before it came
    other.at_rest()
    one._names.of(root, found.values(), {root / "run": "run"}, ())
    shutil.copytree(llama_lora, root / "b" / "new")
    assert set(Following(root).at_rest().adapters) == {"run", "new", "b/new"}


def test_two_other_bases_come_when_the_first_is_gone(root: Path) -> None:
    """An error of the whole, that was, and nothing was followed any more."""
    following = Following(root)
    following.at_rest()
    for name in ("one", "two"):
        base = shutil.copytree(root / "base", root / name / f"base-{name}")
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"] += len(name) + ord(name[0])
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        run = shutil.copytree(root / "run", root / name / f"run-{name}")
        config = (run / CONFIG).read_text().replace('/base"', f'/base-{name}"')
        (run / CONFIG).write_text(config)
    shutil.rmtree(root / "run")
    shutil.rmtree(root / "base")
    found = following.at_rest()
    assert not found.adapters
    assert all("of another base than the rest" in said for said in found.problems.values())
    assert set(found.problems) == {"run-one", "run-two"}


@contextmanager
def serving(
    body: bytes, length: int | None = None, asked: list[str] | None = None, posts: int = 200
) -> Iterator[str]:
    """A server that answers all with `body`, and says that it has `length` bytes; `posts` with that
    status. `asked`: is told what came."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if asked is not None:
                asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(posts if self.command == "POST" else 200)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_words: object) -> None:
            pass

    with answering(Answer) as url:
        yield url


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b'{"data": [', 1000),  # it ended in the middle, as where it is killed
        (b"<html>", None),
        (b"[1]", None),
        (b'{"error": 1}', None),
        (b'{"data": [{"id": "x", "parent": "y"}]}', None),
        (b'{"data": 1}', None),
    ],
)
def test_an_answer_of_no_vllm_ends_nothing(body: bytes, length: int | None, root: Path) -> None:
    with serving(body, length) as url:
        with pytest.raises(OSError, match="no answer of a vLLM"):
            Server(url).adapters()
        done = CliRunner().invoke(main, ["watch", str(root), "--once", "--server", url])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert f"{url} does not answer: no answer of a vLLM" in done.output


def test_a_url_that_is_none_ends_nothing(root: Path) -> None:
    for url in ("localhost:8000", "http://[::1"):
        done = CliRunner().invoke(main, ["watch", str(root), "--once", "--server", url])
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit)
        assert "does not answer" in done.output


def test_a_run_that_is_called_as_the_servers_base_is_not_loaded(root: Path) -> None:
    """vLLM looks among its adapters first: who asked for the base was answered by the run."""
    cards = b'{"data": [{"id": "run", "root": "/x", "parent": null}, {"id": "b", "root": "/x"}]}'
    asked: list[str] = []
    with serving(cards, asked=asked) as url:
        done = CliRunner().invoke(main, ["watch", str(root), "--once", "--server", url])
    assert done.exit_code == 1
    assert f"{url} failed run its base is called so" in done.output
    assert set(asked) == {"GET /v1/models"}


def test_a_run_that_cannot_be_served_and_is_called_so_is_not_refused(root: Path) -> None:
    (root / "run" / CONFIG).write_text("{")
    asked: list[str] = []
    with serving(b'{"data": [{"id": "run", "root": "/x", "parent": null}]}', asked=asked) as url:
        CliRunner().invoke(main, ["watch", str(root), "--once", "--server", url])
    assert set(asked) == {"GET /v1/models"}


def test_of_a_folder_that_is_away_nothing_is_gone(root: Path) -> None:
    following = Following(root)
    adapter = following.at_rest().adapters["run"]
    root.rename(root.with_name("away"))
    for _ in range(2):
        assert following.changed(["run"]) == []
        time.sleep(SETTLE)
    assert following.current("run") == module.Wanted(adapter)


def test_a_cache_that_is_emptied_is_filled_again(root: Path, tmp_path: Path) -> None:
    """vLLM reads the files again whenever it needs room, and a server that is started anew does."""
    following = Following(root)
    adapter = following.at_rest().adapters["run"]
    shutil.rmtree(tmp_path / "cache")
    assert following.at_rest().adapters["run"] == adapter
    assert (adapter / WEIGHTS).is_file()
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_cache_that_takes_no_link_is_no_server_that_does_not_answer(
    root: Path, tmp_path: Path
) -> None:
    place = links(root.resolve())
    Following(root).at_rest()
    (place / "names.json").unlink()
    place.rmdir()
    place.write_text("in the way")
    with serving(b'{"data": []}') as url:
        done = CliRunner().invoke(main, ["watch", str(root), "--once", "--server", url])
    assert done.exit_code == 1
    assert "the cache cannot be written" in done.output
    assert "does not answer" not in done.output
    assert place.is_relative_to(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_where_times_are_whole_seconds_the_last_change_is_seen(root: Path, tmp_path: Path) -> None:
    """The weights change twice within one second, and a look lies in between."""
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    try:
        for command in (
            ["mke2fs", "-qt", "ext2", "-I", "128", "-d", str(root), str(image), "8m"],
            ["mount", "-oloop", str(image), str(place)],
        ):
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no image can be made, or mounted, here")
    try:
        following, weights = Following(place), place / "run" / WEIGHTS
        first = following.at_rest().adapters["run"]
        old = weights.read_bytes()
        changed = {name: tensor * 2 for name, tensor in load_file(weights).items()}
        new = save(changed, {"format": "pt"})
        assert len(new) == len(old)
        for _ in range(3):  # a look and a change at the start of a second, whatever else goes on
            time.sleep(1.02 - time.time() % 1)
            weights.write_bytes(new)
            following.look()
            time.sleep(SETTLE)
            following.look()
            weights.write_bytes(old)
            following.look()
        assert following.at_rest().adapters["run"] == first
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(("status", "passes"), [(400, False), (429, True), (503, True)])
def test_what_a_proxy_says_in_passing_is_no_refusal(
    status: int, passes: bool, tmp_path: Path
) -> None:
    """The run was left out until it changed or the server began anew."""
    wanted = Desired({"run": tmp_path / "run"})
    with serving(b'{"data": []}', posts=status) as url:
        server = Server(url)
        with pytest.raises(OSError, match=str(status)) if passes else nullcontext():
            assert [c.done for c in reconcile(server, wanted, tmp_path / "ours")] == ["failed"]
    assert bool(server.failed) is not passes


def test_a_link_that_leads_elsewhere_is_followed(root: Path, llama_lora: Path) -> None:
    """As git-sync and releases exchange a folder: nothing new was seen, then all was gone."""
    second = root.with_name("second")
    shutil.copytree(root, second)
    weights = second / "run" / "adapter_model.safetensors"
    save_file({n: -t for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    shutil.copytree(llama_lora, second / "new")
    shutil.copytree(llama_lora, root / "old")
    link = root.with_name("current")
    link.symlink_to(root)
    following, ours = Following(link), links(link)
    first = following.at_rest().adapters
    assert set(first) == {"run", "old"}
    link.with_name("next").symlink_to(second)
    link.with_name("next").replace(link)
    assert following.look().adapters == first, "until it is at rest"
    found = following.at_rest()
    assert set(found.adapters) == {"run", "new"}
    assert not found.problems
    assert found.adapters["run"] != first["run"]
    assert found.adapters == Following(second).at_rest().adapters
    assert links(link) == ours, "what was loaded is still known as ours"
    shutil.rmtree(root)
    assert following.at_rest().adapters == found.adapters
    link.unlink()
    with pytest.raises(MissingError):
        following.look()


def test_a_link_is_followed_of_what_is_served_already(root: Path) -> None:
    """Of which vLLM's resolver is asked no more."""
    second = shutil.copytree(root, root.with_name("second"))
    link = root.with_name("current")
    link.symlink_to(root)
    following = Following(link, server=open_base(root / "base"))
    assert following.find("run")
    for _ in range(2):
        following.changed(["run"])
        time.sleep(SETTLE)
    first = following.renew("run")
    assert first is not None and first.adapter is not None
    weights = second / "run" / "adapter_model.safetensors"
    save_file({n: -t for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    link.unlink()
    link.symlink_to(second)
    assert following.changed(["run"]) == []
    time.sleep(SETTLE)
    assert following.changed(["run"]) == ["run"]
    then = following.renew("run")
    assert then is not None and then.adapter not in (None, first.adapter)


def test_what_only_looks_like_a_run_has_a_reason(llama_lora: Path, tmp_path: Path) -> None:
    """Which whoever asks may read: where a link leads is nobody's to know."""
    root = tmp_path / "root"
    shutil.copytree(llama_lora, root / "run")
    (root / "odd" / "adapter_config.json").mkdir(parents=True)
    shutil.copytree(llama_lora, tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    following = Following(root)
    assert not any(following.find(name) for name in ("odd", "link", "nothing"))
    assert following.odd("odd") == "cannot be read: adapter_config.json is no file"
    assert following.odd("link") == "a link out of the folder, which is not followed"
    assert following.odd("nothing") is None
    assert following.odd("run") is None
