"""Outputs at URLs: nothing there looks whole before it is, and nothing whole is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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


def once(method: str, path: str) -> Callable[[str, str], bool]:
    """Whether this is the first such request."""
    seen: list[str] = []

    def first(*request: str) -> bool:
        if request == (method, path):
            seen.append(path)
        return request == (method, path) and len(seen) == 1

    return first


def contents(s3: S3Server, folder: str = "place") -> dict[str, bytes]:
    """The objects of a folder, by their names there."""
    keys = (key for key in s3.keys("out") if key.startswith(f"{folder}/"))
    return {key.removeprefix(f"{folder}/"): s3.read("out", key) for key in keys}


def artifact(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith(".dora-tmp-")}


def stages(files: dict[str, bytes]) -> set[str]:
    return {name.partition("/")[0] for name in files} - set(artifact(files))


MERGE = ("merge", "s3://models/lora", "s3://out/merged", "--base", "s3://models/base")
PLACE = "s3://out/place"
OLD = {FILE: b"old proof", "adapter_config.json": b"{}", "weights": b"old", "more/a[1]?": b"odd"}
NEW = {FILE: b"new proof", "config.json": b"{}", "weights": b"new weights"}


@pytest.fixture
def new(s3: S3Server, tmp_path: Path) -> Path:
    """A folder to put at `PLACE`, where another artifact is."""
    for name, data in OLD.items():
        s3.store.put_object("out", f"place/{name}", data)
    (tmp_path / "new").mkdir()
    for name, data in NEW.items():
        (tmp_path / "new" / name).write_bytes(data)
    return tmp_path / "new"


def replace(source: Path) -> None:
    Store(PLACE, writing=True).upload(source, True, lambda _count: None)


def test_a_killed_upload_does_not_look_whole(s3: S3Server, tmp_path: Path) -> None:
    kill_at(s3, f"/out/merged/{FILE}", str(EXPORT), *MERGE)
    left = s3.keys("out")
    assert "merged/model.safetensors" in left
    assert f"merged/{FILE}" not in left
    assert "no certificate here" in bad("check", "s3://out/merged")
    assert list((tmp_path / "cache").glob("upload-*/*"))
    good("adapter", "s3://models/lora", "s3://out/other")
    assert not list((tmp_path / "cache").glob("upload-*/*"))  # whichever URL it was for
    assert "--force" in bad(*MERGE)
    good(*MERGE, "--force")
    assert "unchanged" in good("check", "s3://out/merged")


def test_a_terminated_upload_is_removed(s3: S3Server, tmp_path: Path) -> None:
    terminate_at(s3, "/out/merged/config.json", *MERGE)
    assert f"merged/{FILE}" not in s3.keys("out")
    assert "merged/model.safetensors" not in s3.keys("out")
    assert not list((tmp_path / "cache").glob("upload-*/*"))


@pytest.mark.parametrize(
    "failing",
    [
        *(f"STAGE/new/{name}" for name in NEW),
        *("STAGE/old/weights", f"STAGE/old/{FILE}"),
        *NEW,
    ],
)
def test_a_failed_replacement_leaves_the_old_artifact(
    s3: S3Server, new: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_serve.remote.store.uuid4", lambda: SimpleNamespace(hex="0123456789"))
    s3.denied = once("PUT", f"/out/place/{failing.replace('STAGE', '.dora-tmp-01234567')}")
    with pytest.raises(RemoteError, match="access denied"):
        replace(new)
    assert contents(s3) == OLD
    replace(new)
    assert contents(s3) == NEW


def test_at_every_moment_of_a_replacement_what_has_a_certificate_is_whole(
    s3: S3Server, new: Path
) -> None:
    moments = []

    def look(method: str, _path: str) -> bool:
        if method in ("PUT", "POST", "DELETE"):
            moments.append(artifact(contents(s3)))
        return False

    s3.denied = look
    replace(new)
    assert contents(s3) == NEW
    assert len(moments) > 10
    assert all(here in (OLD, NEW) for here in moments if FILE in here)
    # Loaders look for the configuration: it comes after the weights, and goes before them.
    for config, weights in (("adapter_config.json", b"old"), ("config.json", b"new weights")):
        assert all(here["weights"] == weights for here in moments if config in here)


def test_the_certificate_is_written_when_the_others_have_arrived(s3: S3Server, new: Path) -> None:
    def lose(_method: str, path: str) -> bool:
        if path.endswith("config.json"):
            s3.store.delete_object("out", f"{path[5:].rpartition('/')[0]}/weights")
        return False

    s3.denied = lose
    for url in ("s3://out/free", PLACE):
        with pytest.raises(RemoteError, match="did not arrive whole"):
            Store(url, writing=True).upload(new, True, lambda _count: None)
    assert not [path for method, path in s3.requests if method == "PUT" and path.endswith(FILE)]
    assert s3.keys("out") == sorted(f"place/{name}" for name in OLD)


def test_what_changes_while_it_is_to_be_replaced_stays(s3: S3Server, new: Path) -> None:
    def change(_method: str, path: str) -> bool:
        if path.endswith(f"/old/{FILE}"):
            s3.store.put_object("out", "place/weights", b"NEW")
        return False

    s3.denied = change
    with pytest.raises(OutputError, match="changed while it was to be replaced"):
        replace(new)
    assert contents(s3) == {**OLD, "weights": b"NEW"}


def test_when_the_old_artifact_cannot_be_put_back_both_are_whole_beside_it(
    s3: S3Server, new: Path
) -> None:
    s3.denied = lambda method, path: (
        method == "PUT" and path.startswith("/out/place/") and ".dora-tmp-" not in path
    )
    with pytest.raises(RemoteError, match="failed half-way") as failure:
        replace(new)
    (stage,) = stages(contents(s3))
    assert f"{PLACE}/{stage}/: old and new" in str(failure.value)
    assert contents(s3) == {
        f"{stage}/{kind}/{name}": data
        for kind, files in (("old", OLD), ("new", NEW))
        for name, data in files.items()
    }
    assert f"a stopped replacement's {stage}" in bad("check", PLACE)
    with pytest.raises(OutputError, match="`force`"):
        Store(PLACE, writing=True).check_free(False)
    s3.reset()
    replace(new)
    assert contents(s3) == NEW


def test_what_may_not_be_removed_stays_whole(s3: S3Server, new: Path) -> None:
    s3.denied = lambda method, path: method == "DELETE" or (method, path) == ("POST", "/out")
    with pytest.raises(RemoteError, match="access denied"):
        replace(new)
    assert artifact(contents(s3)) == OLD
    assert set(Store(PLACE).files()) == set(OLD)  # what is left of the attempt is no part of it


KILLED = """
import sys
from pathlib import Path
from dora_serve.remote_store import Store
Store(sys.argv[1], writing=True).upload(Path(sys.argv[2]), True, lambda count: None)
"""


def test_a_killed_replacement_leaves_both_beside_it(s3: S3Server, new: Path) -> None:
    kill_at(s3, f"/out/place/{FILE}", sys.executable, "-c", KILLED, PLACE, str(new))
    left = contents(s3)
    assert FILE not in artifact(left)
    (stage,) = stages(left)
    assert (contents(s3, f"place/{stage}/old"), contents(s3, f"place/{stage}/new")) == (OLD, NEW)
    replace(new)
    assert contents(s3) == NEW


@pytest.mark.usefixtures("new")
def test_a_switch_is_finished_before_a_signal_is_heeded(s3: S3Server) -> None:
    words = (*MERGE[:2], PLACE, *MERGE[3:], "--force")
    terminate_at(s3, "/out/place/model.safetensors", *words)
    assert "unchanged" in good("check", PLACE)
    assert "model.safetensors" in contents(s3)
    assert not stages(contents(s3))


def test_names_that_are_patterns_are_names(s3: S3Server) -> None:
    """Removing `me*ged/README.md` once removed `merged/README.md` too."""
    good("adapter", "s3://models/lora", "s3://out/merged")
    good("adapter", "s3://models/lora", "s3://out/me*ged")
    s3.client().put_object(Bucket="out", Key="me*ged/a[1]?.txt", Body=b"odd")
    before = contents(s3, "merged")
    good("adapter", "s3://models/lora", "s3://out/me*ged", "--force")
    assert contents(s3, "merged") == before
    assert contents(s3, "me*ged") == before


def test_an_output_that_is_a_file_is_refused(s3: S3Server) -> None:
    s3.client().put_object(Bucket="out", Key="place", Body=b"a file")
    assert "the output is a file" in bad("adapter", "s3://models/lora", PLACE, "--force")
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


@pytest.mark.parametrize("copies", [True, False])
def test_a_folder_and_a_store_that_cannot_copy(
    llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: bool
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    if not copies:
        monkeypatch.setattr(LocalFileSystem, "put_file", AbstractFileSystem.put_file)
        monkeypatch.setattr(LocalFileSystem, "cp_file", AbstractFileSystem.cp_file)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "to" / "out"
    (out / "old" / "deep").mkdir(parents=True)
    (out / "old" / "deep" / "file").write_text("old")
    words = ("adapter", llama_lora, f"file://{out}")
    assert "--force" in bad(*words)
    good(*words, "--force")
    assert "unchanged" in good("check", out)
    assert {FILE, "README.md"} < {path.name for path in out.iterdir()}
    assert not [path for path in out.iterdir() if path.is_dir()]


@pytest.mark.parametrize("bucket", ["models/b\u00e4", 'models/q"/x'])
def test_paths_in_json_become_urls(s3: S3Server, llama_base: Path, bucket: str) -> None:
    """Those with letters that JSON writes otherwise too."""
    url = f's3://{bucket}/b\u00e4"se'
    for path in llama_base.iterdir():
        s3.client().upload_file(str(path), "models", f"{url[12:]}/{path.name}")
    printed = good("adapter", "s3://models/lora", f"{PLACE}/\u00e4", "--base", url, "--json")
    assert json.loads(printed)["output"] == f"{PLACE}/\u00e4"
    files = contents(s3)
    config = json.loads(files["\u00e4/adapter_config.json"])
    assert config["base_model_name_or_path"] == url
    assert url in files["\u00e4/README.md"].decode().replace('\\"', '"')
    assert not [name for name in files if b"/cache/" in files[name]]
    assert "unchanged" in good("check", f"{PLACE}/\u00e4")
