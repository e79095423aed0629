"""Several who put adapters into one server."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest

from dora_serve.vllm import watch
from dora_serve.vllm.desired import Desired
from dora_serve.vllm.kept_names import links
from dora_serve.vllm.replicas import Replica
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


@pytest.mark.parametrize("keep", [False, True])
def test_a_server_without_our_plugin_does_not_take_what_a_run_became(
    tmp_path: Path, keep: bool
) -> None:
    """What it had was unloaded by then."""
    before, after = tmp_path / "before", tmp_path / "after"
    server = Pretended(False, refuses=str(links(tmp_path) / "after"))
    assert reconciled(server, tmp_path, Desired({"run": before}), keep) == {"run": "loaded"}
    assert reconciled(server, tmp_path, Desired({"run": after}), keep) == {"run": "failed"}
    kept = {"run": str(links(tmp_path) / "before")} if keep else {}
    assert server.table == kept
    assert reconciled(server, tmp_path, Desired({"run": after}), keep) == {}
    assert server.table == kept
    assert reconciled(server, tmp_path, Desired({})) == ({"run": "unloaded"} if keep else {})
    assert not server.table


def test_links_in_a_cache_that_was_moved_lead_on(tmp_path: Path) -> None:
    for cache in ("old", "new"):
        link = watch._link(tmp_path / "links", tmp_path / cache / "key")
        assert link.readlink() == tmp_path / cache / "key"
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["key"]


def test_a_server_that_hangs_keeps_no_other_waiting(tmp_path: Path) -> None:
    there, hangs = Pretended(True), Pretended(True)
    answer = Event()

    def hanging() -> dict[str, Path]:
        answer.wait()
        return {}

    hangs.adapters = hanging  # type: ignore[method-assign]
    replicas = [Replica(server, tmp_path, keep=False) for server in (hangs, there)]
    for name in ("one", "two"):
        for replica in replicas:
            replica.follow(Desired({name: tmp_path / name}))
        replicas[1].wait(60)
        assert there.table.keys() == {name}
    assert not hangs.table
    answer.set()
    replicas[0].wait(60)
    assert hangs.table.keys() == {"one"}  # as it was then; the next look is another's
    assert not any(replica.failed for replica in replicas)


def test_what_one_server_reads_is_not_written_for_another(tmp_path: Path) -> None:
    """It would be half a refusal, and taken for an adapter."""
    file = watch._write_refusal(tmp_path, "no room") / "refused.json"
    before = file.stat()
    assert watch._write_refusal(tmp_path, "no room") == file.parent
    assert file.stat() == before
    assert list(file.parent.iterdir()) == [file]
