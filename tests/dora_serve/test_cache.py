"""The cache is the user's alone, and serves only what was made there."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.errors import OutputError
from converters.files.cache import cache_folder, private_cache
from dora_serve.commands import dora_serve
from dora_serve.folder.cache import cached
from dora_serve.remote.local import needs_local
from tests.dora_serve.damage import flip, settle


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_the_users_alone(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()

    cached("key", make)
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700
    for mode, kept in ((0o777, 0o700), (0o601, 0o700), (0o640, 0o700), (0o500, 0o500)):
        own_cache.chmod(mode)
        cached("key", make)
        assert stat.S_IMODE(own_cache.stat().st_mode) == kept

    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(own_cache)
    with pytest.raises(OutputError, match="is a link"):
        cached("key", make)
    monkeypatch.setenv("DORA_SERVE_CACHE", str(own_cache))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OutputError, match="belongs to another user"):
        cached("key", make)


def quietly_changed(folder: Path) -> None:
    times = (folder / "part" / "b").stat()
    flip(folder / "part" / "b")
    os.utime(folder / "part" / "b", ns=(times.st_atime_ns, times.st_mtime_ns))


def gone(folder: Path) -> None:
    (folder / "part" / "b").unlink()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def added(folder: Path) -> None:
    (folder / "part" / "more").write_text("x")


def linked(folder: Path) -> None:
    (folder / "a").rename(folder.parent / "a")
    (folder / "a").symlink_to(folder.parent / "a")


def piped(folder: Path) -> None:
    os.mkfifo(folder / "part" / "c")


def a_folder_more(folder: Path) -> None:
    (folder / "part" / "d").mkdir()


DAMAGE: Mapping[str, Callable[[Path], object]] = {
    "a bit": lambda folder: flip(folder / "a"),
    "a file of the same size and time": quietly_changed,
    "a file is gone": gone,
    "empty": emptied,
    "a file more": added,
    "a link": linked,
    "a pipe": piped,
    "a folder more": a_folder_more,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_not_as_it_was_made_is_made_anew(
    damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "part").mkdir(parents=True)
        (folder / "a").write_text("a" * 100)
        (folder / "part" / "b").write_text("b" * 100)

    folder = cached("key", make)
    assert cached("key", make) == folder
    assert len(made) == 1
    settle()
    cached("key", make)
    assert capsys.readouterr().err == ""
    damage(folder)
    assert cached("key", make) == folder
    assert len(made) == 2
    assert (folder / "a").read_text() == "a" * 100 and not (folder / "a").is_symlink()
    assert sorted(p.name for p in folder.rglob("*")) == ["a", "b", "part"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{folder}: not what was made there; it is made anew"
    cached("key", make)
    assert len(made) == 2


def test_a_folder_of_other_things_keeps_its_rights(own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(0o755)
    (own_cache / "homepage").touch()
    with pytest.raises(OutputError, match="holds what is not of a cache"):
        private_cache()
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o755
    (own_cache / "homepage").unlink()
    private_cache()
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700


def test_what_somebody_else_put_there_is_not_served_and_not_deleted(
    own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "mine").touch()

    (private_cache() / "key").mkdir()
    (own_cache / "key" / "theirs").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (own_cache / "second").symlink_to(tmp_path / "elsewhere")
    for key in ("key", "second"):
        assert [p.name for p in cached(key, make).iterdir()] == ["mine"]
        assert "moved to" in capsys.readouterr().err
        assert not (own_cache / key).is_symlink()
    (kept,) = own_cache.glob("aside-key.*/key/theirs")
    assert kept.read_text() == "precious"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "cache"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("DORA_SERVE_CACHE")
        else:
            monkeypatch.setenv("DORA_SERVE_CACHE", unset)
        assert cache_folder() == tmp_path / "xdg" / "dora-serve"
    assert not (tmp_path / "xdg").exists()
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / "home" / ".cache" / "dora-serve"
    assert private_cache() == cache_folder()
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "below", tmp_path / "file"):
        monkeypatch.setenv("DORA_SERVE_CACHE", str(place))
        with pytest.raises(OutputError, match="cannot be written") as caught:
            private_cache()
        assert caught.value.file == place


@pytest.mark.parametrize("blocked", ["locks", "receipts"])
def test_a_cache_that_holds_things_and_takes_no_more(own_cache: Path, blocked: str) -> None:
    """As one in an image, mounted to be read: what cannot be written is said to be the cache."""
    cached("there", Path.mkdir)
    shutil.rmtree(own_cache / blocked)
    (own_cache / blocked).touch()  # nobody may make anything in it
    with pytest.raises(OutputError, match="the cache cannot be written") as caught:
        cached("new", Path.mkdir)
    assert caught.value.remedy is not None
    assert "DORA_SERVE_CACHE" in caught.value.remedy


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number in a container, whose environment has no HOME."""
    for name in ("DORA_SERVE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(OutputError, match="the cache has no place"):
        cached("key", Path.mkdir)
    needs_local(Path(), "sign")  # needs no cache
    told = CliRunner().invoke(dora_serve, ["env", "--json"])
    assert "no place" in json.loads(told.output)["cache"]
