"""The rank map's files: whole or not there, and nothing replaced that was not to be."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from converters.errors import OutputError
from converters.fit import CurvePoint
from dora_serve import rankmap
from dora_serve.commands import dora_export
from dora_serve.rankmap import palette
from dora_serve.rankmap.html import save_html
from dora_serve.rankmap.output import check_output_file, write_file
from dora_serve.rankmap.picture import save_curve, save_png, terminal_map
from tests.conftest import MODELS

RANKS = {f"m.{layer}.{kind}": layer for layer in range(8) for kind in "qkv"}
Save = Callable[[Path, bool], None]
SAVES: dict[str, tuple[Save, bytes]] = {
    "html": (lambda path, force: save_html({}, {}, path, "t", force), b"<!doctype html>"),
    "png": (lambda path, force: save_png(RANKS, 8, path, "t", force), b"\x89PNG"),
    "curve": (
        lambda path, force: save_curve([CurvePoint(10, 0.5, 1.0)], path, "t", force),
        b"\x89PNG",
    ),
}


@pytest.mark.parametrize("kind", SAVES)
def test_a_file_is_replaced_with_force_only(kind: str, tmp_path: Path) -> None:
    save, begins = SAVES[kind]
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"theirs")
    link.symlink_to("file")
    for place in (path, link):
        with pytest.raises(OutputError, match="`force`"):
            save(place, False)
    assert path.read_bytes() == b"theirs"
    save(link, True)
    assert path.read_bytes().startswith(begins) and link.is_symlink()
    save(tmp_path / "new", False)
    assert (tmp_path / "new").read_bytes() == path.read_bytes()
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert {each.name for each in tmp_path.iterdir()} == {"file", "link", "new"}


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("force", [True, False])
def test_a_full_disk_leaves_what_was_there(kind: str, force: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if force:
        path.write_bytes(b"theirs")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OutputError, match="File too large"):
            SAVES[kind][0](path, force)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"theirs"] * force


def test_what_comes_there_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", lambda _descriptor: path.write_bytes(b"theirs"))
    with pytest.raises(OutputError, match="there already"):
        write_file(path, b"ours")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"theirs"]


def test_places_that_are_no_file(tmp_path: Path) -> None:
    for place in (tmp_path, Path("/dev/null")):
        with pytest.raises(OutputError, match="is no file"):
            check_output_file(place, True)
    with pytest.raises(OutputError, match="no such folder"):
        write_file(tmp_path / "nowhere" / "file", b"")
    with pytest.raises(OutputError, match="File name too long"):
        write_file(tmp_path / ("x" * 300), b"")
    assert not list(tmp_path.iterdir())


def test_all_pictures_have_the_colours_of_the_page() -> None:
    page = (Path(rankmap.__file__).parents[1] / "server" / "page" / "base.css").read_text()
    light = page[: page.index("@media")]
    assert f"--map-empty: {palette.EMPTY};" in light and f"--map: {palette.FULL};" in light
    shown = terminal_map({"m.0.q": 12, "m.0.k": 0, "m.1.q": 1}, 12)
    assert f"48;5;{palette.TERMINAL[-1]}m  12" in shown
    assert f"48;5;{palette.TERMINAL[0]}m   1" in shown
    assert shown.splitlines()[-1].startswith("scale of ranks")


def test_thirty_layers_go_on_below_where_the_terminal_ends() -> None:
    ranks = {f"m.{layer}.self_attn.q_proj": layer for layer in range(30)}
    whole = click.unstyle(terminal_map(ranks, 30)).splitlines()
    folded = click.unstyle(terminal_map(ranks, 30, 80)).splitlines()
    assert len(whole) == 4 and len(folded) == 6
    assert max(map(len, folded)) <= 80 < max(map(len, whole))
    for row, name in ((1, "layer"), (2, "self_attn.q_proj")):
        rows = [words[1:] for words in map(str.split, folded) if words[0] == name]
        told = [number for numbers in rows for number in numbers]
        assert told == whole[row].split()[1:] == [*map(str, range(30))]
    assert len(click.unstyle(terminal_map(ranks, 30, 1)).splitlines()) == 62  # one at a time


def test_what_is_written_is_told(tmp_path: Path) -> None:
    run = next(MODELS.glob("runs/*/*/*/Count_Down/*/checkpoint")).parent
    words = ["inspect", str(run), "--png", str(tmp_path / "x.png")]
    assert f"{tmp_path / 'x.png'}: written" in CliRunner().invoke(dora_export, words).stdout
    told = CliRunner().invoke(dora_export, [*words, "--force", "--json"]).stdout
    assert json.loads(told)["written"] == [str(tmp_path / "x.png")]
