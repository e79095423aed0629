"""An S3 server with a base and a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .exporting import SECRET
from .s3_server import S3Server


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    with S3Server().running() as running:
        yield running


@pytest.fixture
def s3(
    server: S3Server,
    llama_base: Path,
    llama_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[S3Server]:
    """The server with a base and a run in a bucket `models`, and `out` empty."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    client = server.client()
    for bucket in ("models", "out"):
        client.create_bucket(Bucket=bucket)
    for name, folder in (("base", llama_base), ("lora", llama_lora)):
        for path in folder.iterdir():
            client.upload_file(str(path), "models", f"{name}/{path.name}")
    server.reset()
    yield server
    server.release.set()
    server.reset()
    for bucket in ("models", "out"):
        for key in server.keys(bucket):
            client.delete_object(Bucket=bucket, Key=key)
