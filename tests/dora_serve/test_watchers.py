"""Several who put adapters into one server."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_serve.vllm import watch
from dora_serve.vllm.desired import Desired
from tests.dora_serve.test_desired import Pretended, reconciled


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))


def test_of_two_folders_runs_of_one_name_the_later_is_served(tmp_path: Path) -> None:
    """And not each after the other for ever."""
    first, second = Pretended(True), Pretended(True)
    second.table = first.table
    mine, theirs = Desired({"run": tmp_path / "a"}), Desired({"run": tmp_path / "b"})
    assert reconciled(first, tmp_path / "one", mine) == {"run": "loaded"}
    assert reconciled(second, tmp_path / "two", theirs) == {"run": "reloaded"}
    for _ in range(2):
        assert reconciled(first, tmp_path / "one", mine) == {"run": "failed"}
        assert reconciled(second, tmp_path / "two", theirs) == {}
    assert reconciled(second, tmp_path / "two", Desired({})) == {"run": "unloaded"}
    assert reconciled(first, tmp_path / "one", mine) == {"run": "loaded"}


def test_what_was_refused_and_is_anothers_by_now_is_left(tmp_path: Path) -> None:
    """The run that was refused here goes."""
    server = Pretended(True)
    reconciled(server, tmp_path, Desired({}, {"run": "damaged"}))
    server.table["run"] = "/theirs"
    assert reconciled(server, tmp_path, Desired({})) == {}
    assert server.table == {"run": "/theirs"} and not server.refused


def test_the_same_adapter_is_no_other_one(tmp_path: Path) -> None:
    """As `up --live` has loaded it, which follows the folder too."""
    server, wanted = Pretended(True), Desired({"run": tmp_path / "a"})
    assert reconciled(server, tmp_path, wanted) == {"run": "loaded"}
    server.table["run"] = str(tmp_path / "a")
    assert reconciled(server, tmp_path, wanted) == {}


def test_links_in_a_cache_that_was_moved_lead_on(tmp_path: Path) -> None:
    for cache in ("old", "new"):
        link = watch._link(tmp_path / "links", tmp_path / cache / "key")
        assert link.readlink() == tmp_path / cache / "key"
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["key"]
