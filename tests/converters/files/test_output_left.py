"""What a killed command leaves, and what the next one makes of it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converters.errors import (
    OutputError,
)
from converters.files.leftovers import JOURNAL
from converters.files.output import (
    check_output,
    output_folder,
)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


KILLED = """
import os, sys
from pathlib import Path
from converters.files.output import output_folder
with output_folder(Path(sys.argv[1]), resume="resume" in sys.argv) as folder:
    (folder / "half").write_text("x" * 5000)
    if "journal" in sys.argv:
        (folder / ".journal.jsonl").write_text("{}")
    print(folder, flush=True)
    os.read(0, 1)
"""


def killed(target: Path, *words: str) -> Path:
    """A folder whose process was killed (and its janitor, where it has one, has gone)."""
    command = [sys.executable, "-c", KILLED, str(target), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip())
        assert (folder / "half").stat().st_size == 5000
        with output_folder(target) as other:  # in use: not ours to remove
            (other / "file").write_text("another")
        assert folder.is_dir()
        process.kill()
        process.stdout.read()  # the janitor holds none of our ends
    return folder


def test_a_killed_command_with_resume_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder = killed(target, "resume", "journal")
    assert folder.is_dir()
    with output_folder(target, resume=True) as again:
        assert again == folder
        assert (again / "half").exists()
    assert listing(target).keys() == {"half"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("words", [("resume",), ("resume", "journal")])
def test_what_a_killed_command_left_is_removed(tmp_path: Path, words: tuple[str, ...]) -> None:
    target = tmp_path / "out"
    folder = killed(target, *words)
    assert folder.is_dir()
    with output_folder(target) as again:
        assert again != folder and not folder.exists()
        assert not (again / "half").exists()


def test_a_system_that_cannot_exchange_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on one whose C library has no `renameat2`."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    target = tmp_path / "out"
    for content in ("old", "new"):
        with output_folder(target) as folder:
            (folder / content).write_text(content)
        assert listing(target) == {content: content.encode()}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_output_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with an immutable file: what is new is there, and the message says so."""
    target, remove = tmp_path / "out", shutil.rmtree
    with output_folder(target) as folder:
        (folder / "a").write_text("old")

    def refuses(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(1, "Operation not permitted", str(path / "a"))

    monkeypatch.setattr(shutil, "rmtree", refuses)
    with (
        pytest.raises(OutputError, match="new output is in its place") as caught,
        output_folder(target) as folder,
    ):
        (folder / "a").write_text("new")
    assert listing(target) == {"a": b"new"}
    assert Path(str(caught.value.file)).parent == tmp_path
    assert "not permitted" in str(caught.value.found)
    monkeypatch.setattr(shutil, "rmtree", remove)
    with output_folder(target) as folder:
        (folder / "a").write_text("next")
    assert listing(tmp_path) == {"out": None, "out/a": b"next"}


def test_a_killed_group_of_processes_leaves_nothing(tmp_path: Path) -> None:
    """The janitor is in a group of its own, and outlives the one that is killed."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip())
        assert folder.is_dir()
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_temporary_folder_goes_with_its_process(sent: int, tmp_path: Path) -> None:
    code = """
import os
from converters.files.output import temporary
with temporary() as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    os.read(0, 1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip())
        assert listing(folder) == {"half": b"x"}
        process.send_signal(sent)
    deadline = time.monotonic() + 30
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert listing(tmp_path) == {}


def test_an_interrupted_command_with_resume_leaves_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for error in (SystemExit, KeyboardInterrupt):
        with pytest.raises(error), output_folder(target, resume=True) as folder:
            (folder / JOURNAL).write_text("{}")
            raise error
        assert (folder / JOURNAL).exists()
    with pytest.raises(ValueError), output_folder(target, resume=True) as folder:
        raise ValueError
    assert listing(tmp_path) == {}


def test_the_old_output_of_a_stopped_machine_comes_back(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcd1234.dora-tmp"
    (left / "old").mkdir(parents=True)
    (left / "old" / "file").write_text("old")
    with pytest.raises(KeyError), output_folder(tmp_path / "out"):
        raise KeyError
    assert listing(tmp_path) == {"out": None, "out/file": b"old"}
    (left / "old").mkdir(parents=True)
    (left / "old" / "file").write_text("older")
    with pytest.raises(KeyError), output_folder(tmp_path / "out"):
        raise KeyError
    assert listing(tmp_path) == {"out": None, "out/file": b"old"}


def test_folders_that_only_look_like_ours_stay(tmp_path: Path) -> None:
    stays = [
        ".out.abc.dora-tmp",
        ".out.abcd12345.dora-tmp",
        ".xout.abcd1234.dora-tmp",
        "out.abcd1234.dora-tmp",
    ]
    for name in [*stays, ".out.abcd1234.dora-tmp"]:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcd4321.dora-tmp").symlink_to(tmp_path / stays[0])
    with output_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*stays, "out", ".out.abcd4321.dora-tmp"}


def test_the_space_of_a_killed_command_counts_as_free(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcd1234.dora-tmp"
    left.mkdir()
    with (left / "shard").open("wb") as stream:
        stream.write(bytes(64 << 20))
        os.fsync(stream.fileno())
    target = tmp_path / "out"

    def refused(resume: bool) -> bool:
        free = os.statvfs(tmp_path)
        try:
            check_output(target, False, [], free.f_bavail * free.f_frsize + (32 << 20), resume)
        except OutputError as error:
            assert "GB free" in str(error.found)
            return True
        return False

    assert refused(resume=True)
    (left / JOURNAL).write_text("{}")
    assert refused(resume=False)
    assert not refused(resume=True)
