"""An S3 server with a base and a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .exporting import SECRET
from .s3_server import S3Server


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with S3Server().running() as running:
        yield running
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(
    server: S3Server,
    llama_base: Path,
    llama_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[S3Server]:
    """The server with a base and a run in a bucket `models`, and `out` empty."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    server.empty()
    for bucket in ("models", "out"):
        server.store.create_bucket(bucket, "us-east-1")
    for name, folder in (("base", llama_base), ("lora", llama_lora)):
        for path in folder.iterdir():
            server.store.put_object("models", f"{name}/{path.name}", path.read_bytes())
    server.reset()
    yield server
    server.release.set()
    server.reset()
