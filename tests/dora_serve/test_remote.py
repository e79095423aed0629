"""Inputs and outputs at URLs, against a real S3 server over HTTP."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from converters.certificate import FILE
from dora_serve.remote.local import fetched

from .exporting import SECRET, bad, export, good
from .s3_server import S3Server

CONFIG = "adapter_config.json"


def test_a_merge_from_s3_to_s3_equals_the_local_one(
    s3: S3Server, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    local = tmp_path / "merged"
    good("merge", llama_lora, local, "--base", llama_base)
    said = good("merge", "s3://models/lora", "s3://out/to/merged", "--base", "s3://models/base")
    names = {path.name for path in local.iterdir()}
    assert s3.keys("out") == sorted(f"to/merged/{name}" for name in names)
    for name in names:
        assert s3.read("out", f"to/merged/{name}") == (local / name).read_bytes(), name
    assert "dora-export verify s3://models/lora s3://out/to/merged --base s3://models/base" in said
    assert "cache" not in said
    places = ("s3://models/lora", "s3://out/to/merged", "--base", "s3://models/base")
    assert "PASSED" in good("verify", *places)
    checked = good("check", "s3://out/to/merged", "--base", "s3://models/base")
    assert checked.startswith("s3://out/to/merged: merged") and "unchanged" in checked
    assert not list((tmp_path / "cache").glob("upload-*/*"))


def test_an_adapter_from_s3_to_s3_equals_the_local_one(
    s3: S3Server, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    local, url = tmp_path / "adapter", "s3://out/adapter"
    good("adapter", llama_lora, local, "--base", llama_base)
    printed = good("adapter", "s3://models/lora/", url, "--base", "s3://models/base", "--json")
    assert json.loads(printed)["output"] == url
    weights = "adapter_model.safetensors"
    assert s3.read("out", f"adapter/{weights}") == (local / weights).read_bytes()
    proof = json.loads(s3.read("out", f"adapter/{FILE}"))
    known = json.loads((local / FILE).read_text())
    for name in (CONFIG, "README.md"):  # they name the base
        named = (local / name).read_text().replace(str(llama_base), "s3://models/base")
        assert s3.read("out", f"adapter/{name}").decode() == named
        assert proof["files"].pop(name) != known["files"].pop(name)
    assert proof == known
    assert "unchanged" in good("check", url)
    assert "vllm         ok" in good("lint", url, "--base", "s3://models/base", "--target", "vllm")
    modules = json.loads(good("diff", "s3://models/lora", url, "--json"))["modules"]
    assert len(modules) == 6
    assert all(module["relative"] < 1e-6 for module in modules.values())


def test_a_tuned_model_at_a_url_is_extracted(s3: S3Server) -> None:
    base = ("--base", "s3://models/base")
    good("merge", "s3://models/lora", "s3://out/merged", *base)
    said = good("extract", "s3://out/merged", "s3://out/extracted", *base, "--max-rank", "4")
    assert "s3://out/extracted: LoRA adapter" in said
    assert f"extracted/{FILE}" in s3.keys("out")


def test_what_is_unchanged_is_fetched_once_and_what_changed_anew(
    s3: S3Server, llama_lora: Path, tmp_path: Path
) -> None:
    weights = "adapter_model.safetensors"
    get = ("GET", f"/models/lora/{weights}")
    first = good("inspect", "s3://models/lora", "--json")
    assert json.loads(first)["path"] == "s3://models/lora"
    assert get in s3.requests
    s3.requests.clear()
    assert good("inspect", "s3://models/lora", "--json") == first
    assert get not in s3.requests

    tensors = load_file(llama_lora / weights)
    for name in tensors:
        if "q_proj" in name:
            tensors[name].zero_()
    save_file(tensors, tmp_path / weights)
    s3.client().upload_file(str(tmp_path / weights), "models", f"lora/{weights}")
    ranks = json.loads(good("inspect", "s3://models/lora", "--json"))["ranks"]
    assert {rank for name, rank in ranks.items() if "q_proj" in name} == {0}
    assert get in s3.requests


def test_what_is_not_there(s3: S3Server) -> None:
    out = ("s3://out/x", "--base", "s3://models/base")
    for url in ("s3://models/nothing", "s3://no-such-bucket/run"):
        said = bad("merge", url, *out)
        assert said.startswith("error: nothing at this URL")
        assert f"file: {url}" in said
    said = bad("merge", "s3://models/lora", "s3://no-such-bucket/x", *out[1:])
    assert "s3://no-such-bucket/x" in said
    assert "no-such-bucket" not in {b["Name"] for b in s3.client().list_buckets()["Buckets"]}
    assert s3.keys("out") == []


def test_an_error_of_the_run_names_its_url(s3: S3Server) -> None:
    s3.client().put_object(Bucket="models", Key=f"lora/{CONFIG}", Body=b"{")
    said = bad("adapter", "s3://models/lora", "s3://out/x")
    assert f"s3://models/lora/{CONFIG}" in said
    assert "cache" not in said


def test_credentials_that_are_wrong_or_not_allowed(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    iam = s3.client("iam")
    iam.create_user(UserName="stranger")
    key = iam.create_access_key(UserName="stranger")["AccessKey"]
    S3FileSystem.clear_instance_cache()
    s3.check_credentials(True)
    try:
        wrong = bad("inspect", "s3://models/lora")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        S3FileSystem.clear_instance_cache()
        denied = bad("inspect", "s3://models/lora")
    finally:
        s3.check_credentials(False)
        S3FileSystem.clear_instance_cache()
    for said in (wrong, denied):
        assert said.startswith("error: access denied")
        assert "s3://models/lora" in said
        assert key["SecretAccessKey"] not in said


def test_a_run_that_changes_while_it_is_fetched_is_refused(s3: S3Server, tmp_path: Path) -> None:
    s3.held = lambda method, path: (method, path.rsplit("/", 1)[-1]) == ("GET", "README.md")

    def change() -> None:
        s3.holding.wait(60)
        s3.client().put_object(Bucket="models", Key=f"lora/{CONFIG}", Body=b"{}")
        s3.release.set()

    thread = threading.Thread(target=change)
    thread.start()
    said = bad("inspect", "s3://models/lora")
    thread.join()
    # The one where it was read before it changed, the other where its length was known alone.
    assert "changed while they were fetched" in said or "did not arrive whole" in said
    assert not list((tmp_path / "cache").glob("remote-*"))


def test_onnx_takes_named_runs_at_urls(s3: S3Server) -> None:
    words = ("s3://out/graph", "--base", "s3://models/base", "--adapter", "one=s3://models/lora")
    plan = json.loads(good("onnx", *words, "--adapter", "s3://models/lora", "--dry-run", "--json"))
    assert plan["output"] == "s3://out/graph"
    assert list(plan["adapters"]) == ["one", "lora"]
    assert "in place" in bad("onnx", *words, "--add")
    assert s3.keys("out") == []


def test_a_named_url_may_have_the_sign_behind_a_name(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """Folders are called `Lora_Rank=8`: all before the last sign was taken for the name."""
    (tmp_path / "rank=3").mkdir()
    (tmp_path / "rank=3" / "lora").symlink_to(llama_lora)
    named = f"one=file://{tmp_path}/rank=3/lora"
    words = ("onnx", "--base", llama_base, tmp_path / "out", "--adapter", named)
    assert list(json.loads(good(*words, "--dry-run", "--json"))["adapters"]) == ["one"]


@pytest.mark.parametrize("key", ["lora/../../up", "lora/a/../b", "lora//x", "lora/a\tb"])
def test_names_that_lead_out_are_refused(s3: S3Server, key: str, tmp_path: Path) -> None:
    s3.client().put_object(Bucket="models", Key=key, Body=b"out")
    said = bad("inspect", "s3://models/lora")
    assert "lead out of the folder" in said
    assert not list(tmp_path.rglob("remote-*"))
    assert not list(tmp_path.rglob("up"))


def test_odd_names_are_fetched_as_they_are(s3: S3Server, llama_lora: Path) -> None:
    folder, odd = "lo[r]a +%2F#\u00e9*", "odd +%25[1]*?#'\u00e9.txt"
    for path in llama_lora.iterdir():
        s3.store.put_object("models", f"{folder}/{path.name}", path.read_bytes())
    s3.store.put_object("models", f"{folder}/{odd}", b"odd")
    with fetched(f"s3://models/{folder}", lambda *_: nullcontext(lambda _count: None)) as path:
        assert {each.name for each in path.iterdir()} == {
            odd,
            *(p.name for p in llama_lora.iterdir()),
        }
        assert (path / odd).read_bytes() == b"odd"
    good("adapter", f"s3://models/{folder}", f"s3://out/{folder}")
    assert "unchanged" in good("check", f"s3://out/{folder}")


def test_a_name_of_a_file_and_a_folder_is_refused(s3: S3Server) -> None:
    s3.client().put_object(Bucket="models", Key=f"lora/{CONFIG}/x", Body=b"x")
    assert "of a file and of a folder" in bad("inspect", "s3://models/lora")


@pytest.mark.usefixtures("s3")
def test_what_needs_a_local_folder_says_so() -> None:
    good("adapter", "s3://models/lora", "s3://out/adapter")
    assert "in place" in bad("check", "s3://out/adapter", "--record")
    inside = bad("adapter", "s3://models/lora", "s3://models/lora/out")
    assert "inside an input" in inside
    refused = export("inspect", "s3://models/lora", "--png", "s3://out/ranks.png")
    assert refused.exit_code == 2
    assert "not a URL" in refused.output
    assert "names no folder" in bad("adapter", "s3://models/lora", "s3://out", "--force")


def test_other_protocols(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    memory: Any = fsspec.filesystem("memory")
    memory.put(str(llama_lora), "/runs/lora", recursive=True)
    good("adapter", "memory://runs/lora", f"file://{tmp_path}/to/adapter", "--base", llama_base)
    assert "unchanged" in good("check", tmp_path / "to" / "adapter", "--base", llama_base)
    good("merge", "memory://runs/lora", "memory://out/merged", "--base", f"file://{llama_base}")
    assert "unchanged" in good("check", "memory://out/merged", "--base", llama_base)
    memory.put(str(llama_base), "/models/other", recursive=True)
    said = good("adapter", "memory://runs/lora", tmp_path / "x", "--base", "memory://models/other")
    assert "it goes with memory://models/other" in said  # a warning, on stderr
    assert str(tmp_path / "cache") not in said
    again = bad("adapter", "memory://runs/lora", f"file://{tmp_path}/to/adapter", "--force")
    assert "nothing at a URL is replaced" in again
    assert "nothing at this URL" in bad("inspect", "memory://runs/nothing")
    memory.rm("/runs/lora/adapter_config.json")
    assert "no run found" in bad("inspect", "memory://runs/lora")
    memory.rm("/", recursive=True)


BLOCKED = """
import sys
from dora_serve.commands import dora_export
sys.modules["s3fs"] = None
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        sys.exit(f"network: {arguments}")
sys.addaudithook(hook)
dora_export(["merge", *sys.argv[1:]], standalone_mode=False)
print("merged without network")
dora_export(["inspect", "s3://models/lora"])
"""


def test_without_a_url_no_network_and_without_s3fs_a_clear_error(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    words = [str(llama_lora), str(tmp_path / "merged"), "--base", str(llama_base)]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "merged without network" in done.stdout
    assert "pip install 'dora-serve[remote]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "url",
    [
        f"nosuch://me:{SECRET}@host/run",
        f"nosuch://me:a/{SECRET}@host/run",
        f"nosuch://me:a@{SECRET}@host/run",
        f"https://127.0.0.1:9/run?signature={SECRET}",
    ],
)
def test_no_password_or_signature_is_shown(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path))
    assert url.partition(":")[0] in bad("inspect", url)  # `bad` looks for the secret


@pytest.mark.parametrize("status", [None, 403])
def test_a_web_server_that_refuses_is_told_from_one_that_has_nothing(
    status: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path))

    class Refuses(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status or 404)

        do_HEAD = do_GET

        def log_message(self, *_words: object) -> None:
            pass  # it would be taken for the command's output

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{web.server_port}/run"
        try:
            said = bad("inspect", f"{url}?signature={SECRET}")
        finally:
            web.shutdown()
            thread.join()
    assert said.startswith("error: cannot be listed" if status else "error: nothing at this URL")
    assert bad("inspect", url).startswith("error: cannot be listed")  # nobody there any more


def test_no_password_stands_in_an_artifact(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    memory: Any = fsspec.filesystem("memory")
    memory.put(str(llama_base), f"/me:{SECRET}@host/base", recursive=True)
    out = tmp_path / "adapter"
    good("adapter", llama_lora, f"file://{out}", "--base", f"memory://me:{SECRET}@host/base")
    texts = [path.read_text() for path in out.iterdir() if path.suffix != ".safetensors"]
    assert any("memory://…@host/base" in text for text in texts)
    assert not any(SECRET in text for text in texts)
    memory.rm("/", recursive=True)


@pytest.mark.parametrize("name", ["..", ".", "x" * 300, "a\tb"])
def test_a_url_whose_name_no_folder_has(s3: S3Server, name: str, tmp_path: Path) -> None:
    """With `..` the cache itself was written."""
    s3.client().put_object(Bucket="models", Key=f"up/{name}/escaped", Body=b"out")
    assert "names no folder" in bad("inspect", f"s3://models/up/{name}")
    assert "names no folder" in bad("adapter", "s3://models/lora", f"s3://out/{name}")
    assert not list(tmp_path.rglob("escaped"))


def test_more_than_a_page_of_names(s3: S3Server) -> None:
    from dora_serve.remote.store import Store

    names = {f"{number:04}" for number in range(1001)}
    for name in names:
        s3.store.put_object("models", f"many/{name}", b"")
    assert set(Store("s3://models/many").files()) == names


def test_a_copy_that_cannot_be_told_from_the_next_version_is_removed(
    llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(llama_lora.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{web.server_port}/lora"
            assert "peft_lora" in good("inspect", url)
            signed = f"{url}/{CONFIG}?signature={SECRET}"
            with fetched(signed, lambda *_: nullcontext(lambda _count: None)) as path:
                assert path.name == CONFIG
                assert path.read_bytes() == (llama_lora / CONFIG).read_bytes()
                assert SECRET not in str(path)
        finally:
            web.shutdown()
            thread.join()
    assert not list((tmp_path / "cache").rglob("*"))
