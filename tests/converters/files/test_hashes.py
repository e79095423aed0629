"""What is remembered of files, where there is no room to remember it."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import pytest

from converters.files.hashes import Memory, file_hash


def test_a_full_disk_is_left_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"1234")
    time.sleep(0.15)  # what changed just now is not remembered
    usual = file_hash(file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        Memory("another", [file]).keep("answer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 1
    assert Memory("another", [file]).answer is None
    assert file_hash(file) == usual
