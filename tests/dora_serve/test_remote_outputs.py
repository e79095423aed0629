"""Outputs at URLs: nothing there looks whole before it is, and what was there stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fsspec import AbstractFileSystem

from converters.certificate import FILE
from converters.errors import OutputError
from dora_serve.remote.errors import RemoteError
from dora_serve.remote.store import Store

from .exporting import bad, export, good
from .s3_server import S3Server

EXPORT = Path(sys.executable).parent / "dora-export"


@pytest.mark.parametrize("failing", ["model.safetensors", "config.json", FILE])
def test_a_failed_upload_leaves_nothing(s3: S3Server, failing: str, tmp_path: Path) -> None:
    s3.denied = lambda method, path: method == "PUT" and path == f"/out/merged/{failing}"
    said = bad("merge", "s3://models/lora", "s3://out/merged", "--base", "s3://models/base")
    assert said.startswith("error: access denied")
    assert s3.keys("out") == []
    put = [path.rsplit("/", 1)[-1] for method, path in s3.requests if method == "PUT"]
    order = ["model.safetensors", "config.json", FILE]
    assert [name for name in order if name in put] == order[: order.index(failing) + 1]
    assert put[-1] == failing or failing == "model.safetensors"
    assert not list((tmp_path / "cache").glob("upload-*/*"))


def kill_at(s3: S3Server, put: str, *words: str) -> None:
    """Run a command and kill it when it puts `put`, which then never arrives."""
    s3.held = s3.denied = lambda method, path: (method, path) == ("PUT", put)
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        assert s3.holding.wait(60)
        process.send_signal(signal.SIGKILL)
        assert process.communicate(timeout=60) == ("", "")
    s3.release.set()
    s3.reset()


def terminate_at(s3: S3Server, put: str, *words: str) -> None:
    """Run a command here, which gets SIGTERM when it puts `put`."""
    s3.held = lambda method, path: (method, path) == ("PUT", put)

    def stop() -> None:
        s3.holding.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        s3.release.set()

    thread = threading.Thread(target=stop)
    thread.start()
    result = export(*words)
    thread.join()
    assert (result.exit_code, result.stdout) == (128 + signal.SIGTERM, "")


def contents(s3: S3Server, folder: str = "place") -> dict[str, bytes]:
    """The objects of a folder, by their names there."""
    keys = (key for key in s3.keys("out") if key.startswith(f"{folder}/"))
    return {key.removeprefix(f"{folder}/"): s3.read("out", key) for key in keys}


MERGE = ("merge", "s3://models/lora", "s3://out/merged", "--base", "s3://models/base")
PLACE = "s3://out/place"
OLD = {FILE: b"old proof", "adapter_config.json": b"{}", "weights": b"old", "more/a[1]?": b"odd"}
NEW = {FILE: b"new proof", "config.json": b"{}", "weights": b"new weights", "more/a[1]?": b"odd"}


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A folder to put at `PLACE`."""
    for name, data in NEW.items():
        path = tmp_path / "new" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "new"


def upload(source: Path, url: str = PLACE) -> None:
    Store(url, writing=True).upload(source, lambda _count: None)


def test_a_killed_upload_does_not_look_whole(s3: S3Server, tmp_path: Path) -> None:
    kill_at(s3, f"/out/merged/{FILE}", str(EXPORT), *MERGE)
    left = s3.keys("out")
    assert "merged/model.safetensors" in left
    assert f"merged/{FILE}" not in left
    assert "no certificate here" in bad("check", "s3://out/merged")
    assert list((tmp_path / "cache").glob("upload-*/*"))
    good("adapter", "s3://models/lora", "s3://out/other")
    assert not list((tmp_path / "cache").glob("upload-*/*"))  # whichever URL it was for
    before = contents(s3, "merged")
    assert "something is at the output's URL" in bad(*MERGE, "--force")
    assert contents(s3, "merged") == before


def test_a_terminated_upload_is_removed(s3: S3Server, tmp_path: Path) -> None:
    terminate_at(s3, "/out/merged/config.json", *MERGE)
    assert f"merged/{FILE}" not in s3.keys("out")
    assert "merged/model.safetensors" not in s3.keys("out")
    assert not list((tmp_path / "cache").glob("upload-*/*"))


@pytest.mark.parametrize("words", [(), ("--force",), ("--force", "--dry-run"), ("--dry-run",)])
def test_what_is_there_is_never_replaced(s3: S3Server, words: tuple[str, ...]) -> None:
    for name, data in OLD.items():
        s3.store.put_object("out", f"place/{name}", data)
    said = bad("adapter", "s3://models/lora", PLACE, *words)
    assert "nothing at a URL is replaced" in said and f"file: {PLACE}\n" in said
    assert "to do: write to a new URL" in said
    assert contents(s3) == OLD
    assert not [path for _method, path in s3.requests if path.startswith("/models/lora/")]
    good("adapter", "s3://models/lora", f"{PLACE}-2", *words)  # which begins with the same letters


def test_what_comes_there_before_the_upload_stays(s3: S3Server, new: Path) -> None:
    store = Store(PLACE, writing=True)
    store.check_free()
    s3.store.put_object("out", "place/weights", b"theirs")
    with pytest.raises(OutputError, match="nothing at a URL is replaced"):
        store.upload(new, lambda _count: None)
    assert contents(s3) == {"weights": b"theirs"}


@pytest.mark.parametrize("failing", NEW)
def test_a_failed_upload_removes_what_it_put_and_no_more(
    s3: S3Server, new: Path, failing: str
) -> None:
    """Names that are patterns are names: removing `a[1]?` once removed `a12` too."""

    def fail(method: str, path: str) -> bool:
        if (method, path) == ("PUT", f"/out/place/{failing}"):
            s3.store.put_object("out", "place/more/a12", b"theirs")
            return True
        return False

    s3.denied = fail
    with pytest.raises(RemoteError, match="access denied"):
        upload(new)
    assert contents(s3) == {"more/a12": b"theirs"}
    s3.reset()
    upload(new, f"{PLACE}-2")
    assert contents(s3, "place-2") == NEW


def test_at_every_moment_of_an_upload_what_has_a_certificate_is_whole(
    s3: S3Server, new: Path
) -> None:
    moments = []

    def look(method: str, _path: str) -> bool:
        if method == "PUT":
            moments.append(contents(s3))
        return False

    s3.denied = look
    upload(new)
    assert contents(s3) == NEW
    assert [len(here) for here in moments] == [0, 1, 2, 3]
    assert not [here for here in moments if FILE in here]
    # Loaders look for the configuration: it comes after the weights.
    assert ["config.json" in here for here in moments] == [False, False, False, True]


def test_the_certificate_is_written_when_the_others_have_arrived(s3: S3Server, new: Path) -> None:
    def lose(_method: str, path: str) -> bool:
        if path.endswith("config.json"):
            s3.store.delete_object("out", "place/weights")
        return False

    s3.denied = lose
    with pytest.raises(RemoteError, match="did not arrive whole"):
        upload(new)
    assert not [path for method, path in s3.requests if method == "PUT" and path.endswith(FILE)]
    assert s3.keys("out") == []


def test_an_output_that_is_a_file_is_refused(s3: S3Server) -> None:
    s3.client().put_object(Bucket="out", Key="place", Body=b"a file")
    assert "found: a file" in bad("adapter", "s3://models/lora", PLACE, "--force")
    assert s3.read("out", "place") == b"a file"


@pytest.mark.parametrize("end", ["run", "", "link", "run/inner"])
def test_an_input_of_this_machine_is_not_replaced(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """As it was by an output given as the same folder's URL."""
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "all" / "run"
    shutil.copytree(llama_lora, run)
    (run.parent / "link").symlink_to(run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    url = f"file://{run.parent}/{end}"
    for source in (str(run), f"local://{run}"):
        said = bad("adapter", source, url, "--base", llama_base, "--force")
        assert "inside an input" in said
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert "inside an input" in bad("merge", llama_lora, url, "--base", str(run), "--force")


@pytest.mark.parametrize("tells", [True, False])
def test_a_folder_by_its_url(
    llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tells: bool
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    if not tells:
        monkeypatch.setattr(LocalFileSystem, "put_file", AbstractFileSystem.put_file)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "to" / "out"
    (out / "old" / "deep").mkdir(parents=True)
    (out / "old" / "deep" / "file").write_text("old")
    words = ("adapter", llama_lora, f"file://{out}")
    assert "nothing at a URL is replaced" in bad(*words, "--force")
    assert [path.name for path in out.iterdir()] == ["old"]
    (out / "old" / "deep" / "file").unlink()  # empty folders are nothing
    good(*words)
    assert "unchanged" in good("check", out)
    assert {FILE, "README.md"} < {path.name for path in out.iterdir()}


def test_a_failed_upload_leaves_no_folder(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def fail(_self: LocalFileSystem, here: str, there: str, **_options: object) -> None:
        if there.endswith(FILE):
            raise OSError("the disk is gone")
        shutil.copyfile(here, there)

    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    with pytest.raises(RemoteError, match="cannot be written"):
        upload(new, f"file://{tmp_path}/to/out")
    assert not list(tmp_path.glob("to/*"))


@pytest.mark.parametrize("bucket", ["models/b\u00e4", 'models/q"/x'])
def test_paths_in_json_become_urls(s3: S3Server, llama_base: Path, bucket: str) -> None:
    """Those with letters that JSON writes otherwise too."""
    url = f's3://{bucket}/b\u00e4"se'
    for path in llama_base.iterdir():
        s3.client().upload_file(str(path), "models", f"{url[12:]}/{path.name}")
    printed = good("adapter", "s3://models/lora", f"{PLACE}/\u00e4", "--base", url, "--json")
    # The warning that the run names another base stands before it.
    told, _ = json.JSONDecoder().raw_decode(printed, printed.index("{"))
    assert told["output"] == f"{PLACE}/\u00e4"
    files = contents(s3)
    config = json.loads(files["\u00e4/adapter_config.json"])
    assert config["base_model_name_or_path"] == url
    assert url in files["\u00e4/README.md"].decode().replace('\\"', '"')
    assert not [name for name in files if b"/cache/" in files[name]]
    assert "unchanged" in good("check", f"{PLACE}/\u00e4")
