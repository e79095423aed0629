"""What a person sees who waits, on a terminal, and that nobody else sees it."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
from click.testing import CliRunner

import converters.progress
from converters.certificate import sha256
from converters.files.hashes import TensorHashes, file_hash
from converters.files.tensors import open_file
from converters.progress import Progress
from dora_serve import progress
from dora_serve.commands import dora_export
from tests.conftest import MODELS

BASE = MODELS / "tiny-llama-base"
RUN = next(MODELS.glob("runs/*/*/*/Count_Down/*/checkpoint")).parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))


def test_a_bar_tells_the_time_left() -> None:
    with redirect_stderr(Terminal()) as shown, progress.progress_bar(4_000_000, "writing") as bar:
        bar(1_000_000)
        time.sleep(0.2)
        bar(1_000_000)
    assert "writing:  50%" in shown.getvalue() and "<00:" in shown.getvalue()


def test_work_that_cannot_tell_how_far_it_is(tmp_path: Path) -> None:
    """A gigabyte at first as a gigabyte is thought to take, and then as the first one took."""
    left = []
    for _ in range(2):
        with redirect_stderr(Terminal()) as shown, progress.timed("made", "making it", 10**9):
            time.sleep(1.2)
        told = re.findall(r"making it: \d+ s, about (\d+) s left", shown.getvalue())
        left.append(int(told[0]))
    assert left[0] > left[1] > 0
    assert json.loads((tmp_path / "cache" / "pace" / "made").read_text()) >= 0


def test_work_that_takes_longer_than_the_last_promises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_START", 1.7)
    with redirect_stderr(Terminal()) as shown, progress.timed("made", "making it", 1):
        time.sleep(2.3)
    assert "making it: 1 s, about 1 s left" in shown.getvalue()
    assert re.search(r"making it: 2 s *\r", shown.getvalue())


def test_nothing_where_no_terminal_is() -> None:
    with (
        redirect_stderr(io.StringIO()) as shown,
        progress.timed("made", "making it", 1),
        progress.progress_bar(2, "writing") as bar,
    ):
        time.sleep(0.6)
        bar(1)
    assert shown.getvalue() == ""


def test_every_byte_that_is_hashed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path))
    told: dict[str, list[int]] = {}

    @contextmanager
    def bars(total: int, text: str) -> Iterator[Progress]:
        told[text] = [total, 0]

        def advance(count: int) -> None:
            told[text][1] += count

        yield advance

    monkeypatch.setattr(converters.progress, "_bars", bars)
    file = BASE / "model.safetensors"
    tensors = open_file(file)
    for hashed, most in (
        (lambda: file_hash(file), file.stat().st_size),
        (lambda: sha256(file), file.stat().st_size),
        (TensorHashes({file: tensors}).all, file.stat().st_size),
    ):
        told.clear()
        hashed()
        ((total, done),) = told.values()
        assert total == done and most - 10_000 < total <= most


def test_a_command_shows_it_unless_quiet(tmp_path: Path) -> None:
    for more, wanted in ((["--quiet"], False), ([], True)):
        words = ["merge", str(RUN), str(tmp_path / f"out{wanted}"), "--base", str(BASE), *more]
        with redirect_stderr(Terminal()) as shown:
            dora_export.main(words, standalone_mode=False)
        assert ("writing:" in shown.getvalue()) == wanted
    assert CliRunner().invoke(dora_export, [*words, "--force"]).stderr == ""
