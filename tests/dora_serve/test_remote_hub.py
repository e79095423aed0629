"""Inputs and outputs at hf://, through huggingface_hub's file system and a local server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, constants

from converters.certificate import FILE

from .exporting import SECRET, bad, good
from .hub_server import REPOSITORY, HubServer

RUN = f"hf://{REPOSITORY}"


@pytest.fixture
def hub(llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    with HubServer().running() as running:
        # What HF_ENDPOINT sets, which is read once only.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        HfFileSystem.clear_instance_cache()
        for path in llama_lora.iterdir():
            running.files[path.name] = running.files[f"old/{path.name}"] = path.read_bytes()
        yield running
    HfFileSystem.clear_instance_cache()


def test_a_run_at_the_hub_is_read(hub: HubServer) -> None:
    for url in (RUN, f"{RUN}@main", f"{RUN}/old", f"{RUN}@main/old"):
        assert json.loads(good("inspect", url, "--json"))["path"] == url
    hub.files["old/adapter_config.json"] = b"{"
    assert f"{RUN}/old/adapter_config.json" in bad("inspect", f"{RUN}/old")
    assert "nothing at this URL" in bad("inspect", f"{RUN}/other")
    assert "nothing at this URL" in bad("inspect", "hf://someone/else")


def test_an_adapter_at_the_hub_is_written_once(hub: HubServer, llama_lora: Path) -> None:
    before = dict(hub.files)
    url = f"{RUN}/adapter"
    good("adapter", llama_lora, url)
    assert hub.commits[-1] == [f"file adapter/{FILE}"]
    assert "unchanged" in good("check", url)
    assert before.items() < hub.files.items()
    written = dict(hub.files)
    assert "nothing at a URL is replaced" in bad("adapter", llama_lora, url, "--force")
    assert hub.files == written


def test_a_token_is_used_and_not_shown(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = SECRET
    assert "error:" in bad("inspect", RUN)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    HfFileSystem.clear_instance_cache()
    assert "peft_lora" in good("inspect", RUN)
