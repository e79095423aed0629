"""What `force` may replace, where an output can be, and that nothing else is touched."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.certificate import FILE, SIGNATURE, tool, write_certificate, write_json
from converters.errors import OutputError
from converters.files.output import check_output, output_folder, save_tensors
from converters.options import ReadOptions
from dora_serve import merge, read_run, write_adapter, write_onnx
from tests.conftest import MODELS

Change = Callable[[Path], object]


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """An output of ours with a file in a folder."""
    folder = tmp_path / "ours"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("written")
    (folder / "sub" / "file").write_text("written")
    write_certificate(folder, {"tool": tool()})
    return folder


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def repository(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "x").touch()


def linked(folder: Path) -> None:
    (folder / "file").rename(folder.parent / "x")
    (folder / "file").symlink_to("../x")


def no_file(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


def signature(folder: Path, *names: str) -> None:
    """What `sign` writes, so far as it tells what it signs."""
    statement = {"predicate": {"resources": [{"name": name} for name in names]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    write_json(folder / SIGNATURE, {"dsseEnvelope": {"payload": payload}})


REPLACED: dict[str, Change] = {
    "as it was made": lambda _: None,
    "a file went": lambda folder: (folder / "file").unlink(),
    "signed": lambda folder: signature(folder, FILE),
    "an addition broke off": lambda folder: (folder / ".adding.abcd1234.dora-tmp").mkdir(),
    "an addition broke off later": lambda folder: shutil.copytree(
        folder / "sub", folder / ".adding.abcd1234.dora-tmp" / "sub"
    ),
    "emptied": emptied,
}
REFUSED: dict[str, tuple[Change, str]] = {
    "a file more": (lambda f: (f / "thesis.txt").write_text("mine"), "thesis.txt"),
    "a file more, below": (lambda f: (f / "sub/thesis").write_text("mine"), "sub/thesis"),
    "hidden": (lambda f: (f / ".env").write_text("mine"), ".env"),
    "a repository": (repository, ".git/x"),
    "changed": (lambda f: (f / "file").write_text("changed"), "file"),
    "as long": (lambda f: (f / "file").write_text("Written"), "file"),
    "a link": (lambda f: (f / "link").symlink_to("file"), "link"),
    "a link in its place": (linked, "file"),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), "pipe"),
    "no certificate": (lambda f: (f / FILE).unlink(), "file, sub"),
    "of another tool": (lambda f: write_certificate(f, {"tool": "other"}), f"{FILE}, file, sub"),
    "no list": (lambda f: write_json(f / FILE, {"tool": tool()}), f"{FILE}, file, sub"),
    "names alone": (
        lambda f: write_json(f / FILE, {"tool": tool(), "files": {"file": {}}}),
        "file, sub/file",
    ),
    "leads out": (
        lambda f: write_json(f / FILE, {"tool": tool(), "files": {"../x": {}}}),
        f"{FILE}, file, sub",
    ),
    "nested": (lambda f: (f / FILE).write_text("[" * 10**6), f"{FILE}, file, sub"),
    "a folder as certificate": (no_file, "sub"),
    "a file called as a signature": (lambda f: (f / SIGNATURE).write_text("mine"), SIGNATURE),
    "JSON called as a signature": (lambda f: write_json(f / SIGNATURE, {"a": 1}), SIGNATURE),
    "a signature of something else": (lambda f: signature(f, "thesis.txt"), SIGNATURE),
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_an_output_of_ours_is_replaced(change: Change, ours: Path) -> None:
    change(ours)
    if any(ours.iterdir()):
        with pytest.raises(OutputError, match="not empty"):
            check_output(ours, False, [])
    check_output(ours, True, [])
    with output_folder(ours) as folder:
        (folder / "new").write_text("new")
    assert listing(ours) == {"new": b"new"}


@pytest.mark.parametrize(("change", "found"), REFUSED.values(), ids=REFUSED)
def test_anything_else_stays(change: Change, found: str, ours: Path) -> None:
    change(ours)
    before = listing(ours)
    with pytest.raises(OutputError, match="not written here, or was changed") as caught:
        check_output(ours, True, [])
    assert found in str(caught.value.found)
    assert listing(ours) == before


def test_many_in_the_way_are_counted(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}").touch()
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path, True, [])
    assert caught.value.found == "0, 1, 2, 3, 4, and 3 more"


def test_what_comes_into_an_output_of_ours_meanwhile_stays(ours: Path) -> None:
    with pytest.raises(OutputError, match="thesis"), output_folder(ours) as folder:
        (folder / "new").touch()
        (ours / "thesis").write_text("mine")
    assert (ours / "thesis").read_text() == "mine" and (ours / "file").exists()
    assert [path.name for path in ours.parent.iterdir()] == ["ours"]


def test_places_that_no_output_can_have(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "below").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(ours / "sub")
    told = {
        tmp_path / "loop": "no possible path",
        tmp_path / "loop" / "out": "no possible path",
        tmp_path / ("x" * 300): "no possible path|File name too long",
        tmp_path / "\0": "no possible path",
        ours / "file" / "out": "below a file",
        ours / "file": "is a file",
        tmp_path / "pipe": "is a file",
        Path("/dev/null"): "is a file",
        Path(): "current folder",
        Path(".."): "current folder",
        ours: "current folder",
        Path("/"): "current folder|mounted",
        Path("/proc"): "mounted",
    }
    before = listing(tmp_path)
    for place, says in told.items():
        with pytest.raises(OutputError, match=says):
            check_output(place, True, [])
    assert listing(tmp_path) == before


@pytest.mark.parametrize("given", ["", "checkpoint"])
def test_nothing_is_written_into_what_was_given(given: str, tmp_path: Path) -> None:
    base = MODELS / "tiny-llama-base"
    sample = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
    run = Path(shutil.copytree(sample, tmp_path / "run"))
    before = listing(run)
    info = MODELS / "runs/Log" / sample.relative_to(MODELS / "runs/Checkpoint") / "task_info.json"
    read = read_run(run / given, ReadOptions(task_info=info))
    writes: list[Callable[[Path], object]] = [
        lambda output: merge(read, output, base=base),
        lambda output: write_adapter(read, output),
        lambda output: write_onnx(base, output, run=read, dry_run=True),
        lambda output: write_onnx(base, output, adapters={"a": read}, dry_run=True),
    ]
    for write in writes:
        with pytest.raises(OutputError, match="inside an input"):
            write(run / given / "x")
    assert listing(run) == before


def test_an_empty_current_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place could be taken, but whoever stands in it would stand in nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="current folder"):
        check_output(Path(), False, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kind", ["-ttmpfs", "--bind"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_mount_is_not_replaced(kind: str, inside: bool, ours: Path) -> None:
    """As a volume of a container; one of the same file system does not show in its device."""
    place = ours / "sub" if inside else ours
    source = "none" if kind == "-ttmpfs" else str(place)
    mounted = subprocess.run(["mount", kind, source, str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError, match="a file system is mounted"):
            check_output(ours, True, [])
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert (ours / "sub" / "file").read_text() == "written"


def test_through_a_link_the_folder_is_replaced_and_the_link_stays(ours: Path) -> None:
    link = ours.parent / "link"
    link.symlink_to("ours")
    check_output(link, True, [])
    with output_folder(link) as folder:
        (folder / "new").touch()
    assert link.is_symlink() and listing(ours) == {"new": b""}
    thesis = ours / "thesis"
    thesis.touch()
    with pytest.raises(OutputError, match="not written here"):
        check_output(link, True, [])
    assert thesis.exists()


def test_a_folder_that_cannot_change_its_place_leaves_nothing(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == ours:
            raise OSError(16, os.strerror(16), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    before = listing(ours)
    with pytest.raises(OSError, match="busy"), output_folder(ours) as folder:
        (folder / "new").touch()
    assert listing(ours) == before
    assert [path.name for path in ours.parent.iterdir()] == ["ours"]


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_what_another_user_put_beside_the_output_is_not_taken_for_ours(tmp_path: Path) -> None:
    theirs = tmp_path / ".out.abcd1234.dora-tmp"
    (theirs / "old").mkdir(parents=True)
    (theirs / "old" / "evil").touch()
    os.chown(theirs, 65534, 65534)
    with output_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert listing(tmp_path / "out") == {"file": b""}
    assert (theirs / "old" / "evil").exists()


def test_what_cannot_be_removed_is_not_replaced(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be left behind under a hidden name."""
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != f"{ours}/sub" or mode != os.W_OK | os.X_OK
    )
    before = listing(ours)
    with pytest.raises(OutputError, match="no permission to remove"):
        check_output(ours, True, [])
    assert listing(ours) == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_rights_are_those_of_the_mask(
    mask: int, dora_run: Path, llama_base: Path, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        write_adapter(dora_run, tmp_path / "adapter", base=llama_base)
        merge(dora_run, tmp_path / "merged", base=llama_base)
    finally:
        os.umask(before)
    for path in [*(tmp_path / "adapter").rglob("*"), *(tmp_path / "merged").rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_group_that_is_inherited_stays(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    with output_folder(tmp_path / "shared" / "out") as folder:
        save_tensors({}, folder / "x.safetensors")
    assert (tmp_path / "shared" / "out").stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("text", ["", "."])
def test_an_output_without_a_name(
    text: str, dora_run: Path, llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=r"empty|current folder"):
        write_adapter(dora_run, text, base=llama_base, force=True)
    assert listing(tmp_path) == before
