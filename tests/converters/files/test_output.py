"""Outputs appear whole or not at all, beside what others write."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.certificate import tool, write_certificate
from converters.errors import (
    OutputError,
)
from converters.files.leftovers import JOURNAL
from converters.files.output import (
    addition,
    check_output,
    output_folder,
    save_tensors,
)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_an_output_appears_whole_with_the_rights_of_a_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with output_folder(target) as folder:
        assert folder.parent == target.parent
        assert folder.name.startswith(".out.")
        assert not target.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        (folder / JOURNAL).write_text("not for others")
    assert listing(tmp_path) == {
        "a": None, "a/b": None, "a/b/out": None, "a/b/out/sub": None, "a/b/out/sub/file": b"x"
    }  # fmt: skip
    (tmp_path / "made").mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "made").stat().st_mode)


def test_the_mask_of_the_process_stays(tmp_path: Path) -> None:
    before = os.umask(0o27)
    try:
        with output_folder(tmp_path / "out"):
            pass
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
        assert os.umask(0o27) == 0o27
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [KeyError, SystemExit, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("x")
        raise error
    assert listing(tmp_path) == {}


def test_after_an_error_the_old_output_and_its_neighbours_stay(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    (tmp_path / "a" / "other").write_text("other")
    before = listing(tmp_path)
    with pytest.raises(KeyError), output_folder(target) as folder:
        (folder / "new").write_text("x")
        raise KeyError
    assert listing(tmp_path) == before
    with output_folder(target) as folder:
        (folder / "new").write_text("x")
    assert listing(target) == {"new": b"x"}
    assert [path.name for path in (tmp_path / "a").iterdir() if path.name[0] == "."] == []


def test_an_output_that_another_wrote_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="meanwhile") as caught, output_folder(target) as folder:
        (folder / "a").write_text("ours")
        target.mkdir()
        (target / "b").write_text("theirs")
    assert caught.value.file == target
    assert listing(tmp_path) == {"out": None, "out/b": b"theirs"}
    target = tmp_path / "empty"
    with output_folder(target) as folder:
        target.mkdir()
        (folder / "a").write_text("ours")
    assert listing(target) == {"a": b"ours"}


@pytest.mark.parametrize(
    ("number", "word"), [(28, "disk"), (5, "disk"), (30, "disk"), (27, "disk"), (122, "disk"),
                         (13, "file"), (1, "file"), (2, "file"),
                         (11, "limits"), (12, "limits"), (23, "limits"), (24, "limits")]
)  # fmt: skip
def test_errors_of_the_system(tmp_path: Path, number: int, word: str) -> None:
    for name in (None, "there"):
        with pytest.raises(OutputError) as caught, output_folder(tmp_path / "out"):
            raise OSError(number, os.strerror(number), name)
        assert caught.value.file == (name or tmp_path / "out")
        assert os.strerror(number) in caught.value.message
        assert f"look after the {word}" in str(caught.value.remedy)
    assert listing(tmp_path) == {}


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), output_folder(tmp_path / "out"):
        raise OSError(32, "Broken pipe")


def test_sigterm_unwinds_and_the_handler_comes_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, output_folder(tmp_path / "out"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert listing(tmp_path) == {}


def test_sigterm_that_python_drops_comes_back(tmp_path: Path) -> None:
    """What arises in the callback of a weak reference, as while torch exports a graph, is printed
    and dropped: the command went on to its end."""

    class Traced: ...

    def forget(_reference: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    hook, traced = sys.unraisablehook, Traced()
    kept = weakref.ref(traced, forget)
    with pytest.raises(SystemExit) as caught, output_folder(tmp_path / "out"):
        del traced
        time.sleep(5)
    assert kept() is None and caught.value.code == 143
    assert sys.unraisablehook is hook and listing(tmp_path) == {}


def test_outputs_from_another_thread(tmp_path: Path) -> None:
    done: list[object] = []

    def write() -> None:
        with output_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
        done.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert done == [True]
    assert listing(tmp_path / "out") == {"file": b"x"}


def test_what_cannot_be_removed_stays_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / ".adding.left.dora-tmp").write_text("no folder")
    with addition(tmp_path):
        pass
    assert listing(tmp_path) == {".adding.left.dora-tmp": b"no folder"}


def test_additions_are_made_one_at_a_time_and_disappear(tmp_path: Path) -> None:
    (tmp_path / ".adding.left.dora-tmp").mkdir()
    (tmp_path / "file").write_text("x")
    with addition(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".adding.") and folder.name.endswith(".dora-tmp")
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]
        order: list[str] = []

        def second() -> None:
            with addition(tmp_path):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert listing(tmp_path) == {"file": b"x"}
    with pytest.raises(OutputError) as caught, addition(tmp_path / "none"):
        pass
    assert caught.value.file == tmp_path / "none"
    with pytest.raises(OutputError), addition(tmp_path):
        raise OSError(28, "No space left on device")


def test_save_tensors(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.arange(3))
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }
    with pytest.raises(OutputError) as caught:
        save_tensors({"a": torch.arange(3)}, tmp_path / "none" / "x.safetensors")
    assert caught.value.file == tmp_path / "none" / "x.safetensors"


def test_outputs_that_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    write_certificate(tmp_path / "full", {"tool": tool()})
    (tmp_path / "input").mkdir()
    inputs = [tmp_path / "input", tmp_path / "input2"]
    for target in ("empty", "new", "new/deep/er", "input-like"):
        check_output(tmp_path / target, False, inputs)
    check_output(tmp_path / "full", True, inputs)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full", "input"}


def test_outputs_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "base" / "input").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "base" / "input")
    inputs = [tmp_path / "elsewhere", tmp_path / "base" / "input"]
    for target in ("base/input", "base/input/deep/er", "base", "link", "link/deep"):
        with pytest.raises(OutputError, match="inside an input") as caught:
            check_output(tmp_path / target, True, inputs)
        assert caught.value.file == tmp_path / target
        assert caught.value.found == f"input {tmp_path / 'base' / 'input'}"
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "full" / "file", True, inputs)
    with pytest.raises(OutputError, match="not empty"):
        check_output(tmp_path / "full", False, inputs)
    free = os.statvfs(tmp_path)
    space = free.f_bavail * free.f_frsize
    check_output(tmp_path / "new", False, inputs, space // 2)
    with pytest.raises(OutputError, match="space"):
        check_output(tmp_path / "new" / "deep", False, inputs, space * 2)


def test_an_input_that_is_mounted_elsewhere_too(tmp_path: Path) -> None:
    """The other path is another name of the same folder: `force` would replace what is read."""
    alone = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("this system lets nobody mount")
    (tmp_path / "base" / "input").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    asked = """import sys
from pathlib import Path
from converters.errors import OutputError
from converters.files.output import check_output
base, other = map(Path, sys.argv[1:])
for target in ("input", "input/new", "new/er"):
    try:
        check_output(other / target, True, [base / "input"])
    except OutputError as error:
        print(target, error.message)
"""
    mounted = f'mount --bind "$1" "$2" && exec "{sys.executable}" -c "$0" "$1" "$2"'
    folders = [str(tmp_path / "base"), str(tmp_path / "other")]
    done = subprocess.run(
        [*alone, "sh", "-c", mounted, asked, *folders], capture_output=True, text=True
    )
    said = "the output would lie inside an input, or hold it"
    assert done.stdout.splitlines() == [f"input {said}", f"input/new {said}"], done.stderr
