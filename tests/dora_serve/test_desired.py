"""What a vLLM should have of a folder that changes (`dora_serve.vllm.desired`), without a vLLM."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters.errors import MissingError, RunError, TargetError
from converters.model.base import open_base
from dora_serve import write_adapter
from dora_serve.commands import dora_serve as main
from dora_serve.folder.inventory import Member
from dora_serve.vllm import desired as module
from dora_serve.vllm import watch
from dora_serve.vllm.convert import vllm_adapter
from dora_serve.vllm.desired import SETTLE, UNREAD, Desired, Following
from dora_serve.vllm.kept_names import KeptNames, links
from dora_serve.vllm.watch import Server, reconcile, refusal_at
from tests.conftest import MODELS
from tests.dora_serve.following import desired

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path, llama_base: Path, llama_lora: Path) -> Path:
    """A base, a run, and an adapter that was written for vLLM."""
    shutil.copytree(llama_base, tmp_path / "root" / "base")
    shutil.copytree(llama_lora, tmp_path / "root" / "run")
    write_adapter(llama_lora, tmp_path / "root" / "ready", base=llama_base, target="vllm")
    return tmp_path / "root"


@pytest.fixture
def other_base(tmp_path: Path, llama_base: Path) -> Path:
    out = shutil.copytree(llama_base, tmp_path / "elsewhere" / "other")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def other(lora: Path, out: Path, factor: float = 2.0) -> Path:
    """`lora` with other values."""
    shutil.copytree(lora, out)
    changed = {name: tensor * factor for name, tensor in load_file(lora / WEIGHTS).items()}
    save_file(changed, out / WEIGHTS, {"format": "pt"})
    return out


def at_rest(following: Following) -> module.Desired:
    return following.at_rest()


def first_b(adapter: Path) -> torch.Tensor:
    tensors = load_file(adapter / WEIGHTS)
    return tensors[min(name for name in tensors if "lora_B" in name)]


def test_nothing_is_served_from_the_folder(root: Path, tmp_path: Path) -> None:
    found = desired(root)
    assert set(found.adapters) == {"run", "ready"}
    for adapter in found.adapters.values():
        assert adapter.parent == tmp_path / "cache"
    before = first_b(found.adapters["ready"])
    weights = root / "ready" / WEIGHTS
    with weights.open("r+b") as file:  # the same file, as `cp` and editors write it
        file.seek(-4, 2)
        file.write(b"\0\1\2\3")
    assert torch.equal(first_b(found.adapters["ready"]), before)
    shutil.rmtree(root / "ready")
    assert torch.equal(first_b(found.adapters["ready"]), before)


def test_a_change_is_taken_once_it_is_at_rest(root: Path, tmp_path: Path) -> None:
    following = Following(root)
    first = at_rest(following).adapters["run"]
    new = other(root / "run", tmp_path / "new")
    data = (new / WEIGHTS).read_bytes()
    (root / "run" / WEIGHTS).write_bytes(data[:500])
    assert following.look().adapters["run"] == first
    assert following.moving
    (root / "run" / WEIGHTS).write_bytes(data)
    assert following.look().adapters["run"] == first
    time.sleep(SETTLE)
    second = following.look().adapters["run"]
    assert second != first
    assert not torch.equal(first_b(second), first_b(first))
    assert not following.moving
    shutil.rmtree(root / "run")
    assert following.look().adapters["run"] == second, "it may be about to be exchanged"
    time.sleep(SETTLE)
    assert "run" not in following.look().adapters
    assert first.is_dir()
    assert second.is_dir()


def test_what_comes_back_is_what_it_was(root: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(root / "run", tmp_path / "kept")
    following = Following(root)
    first = at_rest(following).adapters["run"]
    shutil.rmtree(root / "run")
    other(kept, root / "run")
    second = at_rest(following).adapters["run"]
    shutil.rmtree(root / "run")
    shutil.copytree(kept, root / "run")
    assert at_rest(following).adapters["run"] == first != second


@pytest.mark.parametrize("keep", [False, True])
def test_what_can_no_longer_be_served(root: Path, keep: bool) -> None:
    following = Following(root, keep=keep)
    first = at_rest(following).adapters["run"]
    weights = root / "run" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    found = at_rest(following)
    assert "does not match its header" in found.problems["run"]
    assert str(root) not in found.problems["run"]
    assert found.adapters.get("run") == (first if keep else None)
    assert "ready" in found.adapters
    shutil.rmtree(root / "run")
    assert "run" not in at_rest(following).adapters


def test_a_path_that_was_asked_for_is_known_whoever_asks_next(root: Path) -> None:
    (root / "sub").mkdir()
    (root / "run").rename(root / "sub" / "run")
    following = Following(root, server=open_base(root / "base"))
    assert following.find("sub/run")
    assert following.changed(["sub/run"]) == []  # not at rest yet
    assert following.find("ready")
    assert following.settled("sub/run") is UNREAD


def test_a_run_in_whose_place_a_model_lies(root: Path) -> None:
    following = Following(root)
    assert "run" in at_rest(following).adapters
    shutil.rmtree(root / "run")
    shutil.copytree(root / "base", root / "run")
    found = at_rest(following)
    assert "run" not in found.adapters
    assert "ready" in found.adapters


def test_a_file_outside_of_the_runs_folder_is_part_of_the_run(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(MODELS / "tiny-llama-base", root / "base")
    run = Path("Tiny_Llama", "Lora_Rank=8", "Count_Down", "Tiny_Llama--Count_Down--1")
    for part in ("Checkpoint", "Log"):
        shutil.copytree(MODELS / "runs" / part / run, root / part / run)
    following = Following(root)
    (first,) = at_rest(following).adapters.values()
    info = root / "Log" / run / "task_info.json"
    said = json.loads(info.read_text())
    info.write_text(json.dumps({**said, "lora_alpha": 4 * float(said["lora_alpha"])}))
    (second,) = at_rest(following).adapters.values()
    assert torch.allclose(first_b(second), 2 * first_b(first))  # the other half is in A


def test_a_server_without_room_and_another_base(root: Path, other_base: Path) -> None:
    def refuse(member: Member) -> None:
        if member.name == "run":
            raise TargetError("no room")

    following = Following(root, server=open_base(root / "base"), check=refuse)
    found = at_rest(following)
    assert found.problems == {"run": "no room"}
    strange = Following(root, server=open_base(other_base))
    assert at_rest(strange).adapters == {}


def test_runs_of_several_bases(root: Path, other_base: Path) -> None:
    following = Following(root)
    assert set(at_rest(following).adapters) == {"run", "ready"}
    shutil.copytree(other_base, root / "other")
    config = json.loads((root / "run" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(root / "other")
    (root / "run" / "adapter_config.json").write_text(json.dumps(config))
    found = at_rest(following)
    assert set(found.adapters) == {"ready"}
    assert "run" in found.problems
    with pytest.raises(RunError, match="one server has one base"):
        desired(root)


def test_names_stay_when_a_namesake_comes(root: Path, llama_lora: Path) -> None:
    shutil.copytree(llama_lora, root / "a" / "twin")
    assert "twin" in desired(root).adapters
    shutil.copytree(llama_lora, root / "b" / "twin")
    shutil.copytree(llama_lora, root / "twin")
    for _ in range(2):  # the second is another process, as after a restart
        following = Following(root)
        assert set(at_rest(following).adapters) == {
            "run", "ready", "twin", "b/twin", "root/twin",
        }  # fmt: skip
        assert following._paths["twin"] == root / "a" / "twin"
    shutil.rmtree(root / "a")
    at_rest(following)
    assert set(at_rest(following).adapters) == {"run", "ready", "b/twin", "root/twin"}


def test_names_that_are_the_servers(root: Path, llama_lora: Path) -> None:
    shutil.copytree(llama_lora, root / "below" / "run2")
    following = Following(root, server=open_base(root / "base"), reserved=["run", "run2"])
    assert set(at_rest(following).adapters) == {"root/run", "ready", "below/run2"}


def test_a_name_that_the_server_takes_later(root: Path) -> None:
    names = {root / "run": "run"}
    assert KeptNames(root).of(root, names, names, ()) == {"run": root / "run"}
    assert KeptNames(root).of(root, names, names, {"run"}) == {"root/run": root / "run"}


@pytest.mark.parametrize(
    "name",
    ["./run", "run/", "a/../run", "{root}/run", " run", "run ", "", ".", "..", "a//b", "a\0"],
)
def test_one_run_has_one_name(root: Path, name: str, llama_lora: Path) -> None:
    shutil.copytree(llama_lora, root / "a" / "b")
    following = Following(root)
    assert following.find("run")
    assert following.find("b")
    assert following.find("a/b")
    assert not following.find(name.format(root=root))


def test_a_folder_that_is_away(root: Path) -> None:
    following = Following(root)
    at_rest(following)
    root.rename(root.with_name("away"))
    with pytest.raises(MissingError):
        following.look()
    with pytest.raises(MissingError):
        following.find("run")
    root.with_name("away").rename(root)
    assert set(at_rest(following).adapters) == {"run", "ready"}


class Pretended(Server):
    """A vLLM's table, with our plugin or without."""

    def __init__(self, plugin: bool, refuses: str = "") -> None:
        super().__init__("http://nowhere")
        self.plugin, self.refuses = plugin, refuses or None  # a name, or a path
        self.table: dict[str, str] = {}
        self.posts: list[tuple[str, str, bool]] = []

    def adapters(self) -> dict[str, Path]:
        found = {name: Path(path) for name, path in self.table.items()}
        self._had = set(found)
        return found

    def _post(self, verb: str, name: str, **more: Any) -> None:
        path, inplace = str(more.get("lora_path", "")), bool(more.get("load_inplace"))
        self.posts.append((verb, name, inplace))
        reason = refusal_at(path)
        known = (verb == "load" and (reason is None or self.plugin)) or name in self.table
        if not (known or (self.plugin and verb == "unload")) or self.refuses in (name, path):
            raise HTTPError(self.url, 400, "no", {}, io.BytesIO())  # type: ignore[arg-type]
        if verb == "unload" or reason is not None:
            self.table.pop(name, None)
        else:
            assert inplace or name not in self.table
            self.table[name] = path


Done = Mapping[str, str]


def reconciled(
    server: Server, root: Path, following: Following | Desired, keep: bool = False
) -> Done:
    wanted = following if isinstance(following, Desired) else at_rest(following)
    changes = reconcile(server, wanted, links(root), keep=keep)
    return {change.name: change.done for change in changes}


@pytest.mark.parametrize("plugin", [True, False])
def test_a_server_is_made_equal(root: Path, tmp_path: Path, plugin: bool) -> None:
    server, following = Pretended(plugin), Following(root)
    server.table["theirs"] = "/elsewhere"
    assert reconciled(server, root, following) == {"run": "loaded", "ready": "loaded"}
    assert reconciled(server, root, following) == {}
    other(root / "run", tmp_path / "new")
    shutil.copyfile(tmp_path / "new" / WEIGHTS, root / "run" / WEIGHTS)
    server.posts.clear()
    assert reconciled(server, root, following) == {"run": "reloaded"}
    assert [post for post in server.posts if post[1] == "run"] == (
        [("load", "run", True)] if plugin else [("unload", "run", False), ("load", "run", False)]
    )
    (root / "run" / WEIGHTS).write_bytes(b"damaged")
    assert reconciled(server, root, following) == {"run": "refused"}
    assert reconciled(server, root, following) == {}
    assert set(server.table) == {"ready", "theirs"}
    shutil.rmtree(root / "ready")
    assert reconciled(server, root, following) == {"ready": "unloaded"}
    assert set(server.table) == {"theirs"}


def test_what_a_server_does_not_take_is_told_once(root: Path) -> None:
    server, following = Pretended(True, refuses="run"), Following(root)
    (root / "run" / WEIGHTS).write_bytes(b"damaged")
    assert reconciled(server, root, following) == {"ready": "loaded"}
    assert "file" in server.refused["run"]
    shutil.copyfile(root / "ready" / WEIGHTS, root / "run" / WEIGHTS)
    shutil.copyfile(root / "ready" / "adapter_config.json", root / "run" / "adapter_config.json")
    assert reconciled(server, root, following) == {"run": "failed"}
    assert "no" in server.refused["run"]
    server.posts.clear()
    assert reconciled(server, root, following) == {}
    assert not server.posts


def test_a_refusal_is_told_once(root: Path, tmp_path: Path) -> None:
    server, wanted = Pretended(True), Desired({}, {"run": "no room"})
    for posts in (["dora-serve probe", "dora-serve probe", "run"], []):
        server.posts.clear()
        assert reconciled(server, root, wanted) == {}
        assert [name for _, name, _ in server.posts] == posts
    assert reconciled(server, root, Desired({"run": tmp_path})) == {"run": "loaded"}
    assert "run" not in server.refused


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_run_became_is_not_taken(root: Path, tmp_path: Path, keep: bool) -> None:
    server = Pretended(True)
    before, after = tmp_path / "before", tmp_path / "after"
    assert reconciled(server, root, Desired({"run": before}), keep) == {"run": "loaded"}
    server.refuses = "run"
    assert reconciled(server, root, Desired({"run": after}), keep) == {"run": "failed"}
    assert ("run" in server.refused) is not keep
    assert server.table["run"] == str(links(root) / "before")
    server.refuses = "new"  # of which there is nothing to go on with
    new = Desired({"run": before, "new": after})
    assert reconciled(server, root, new, keep) == {"new": "failed"}
    assert "new" in server.refused


def test_what_moves_is_left_as_it_is(root: Path, tmp_path: Path) -> None:
    server = Pretended(True)
    assert reconciled(server, root, Desired({"run": tmp_path})) == {"run": "loaded"}
    assert reconciled(server, root, Desired({}, moving={"run"})) == {}
    assert reconciled(server, root, Desired({})) == {"run": "unloaded"}


def test_of_another_start_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    server, there = Server("http://nowhere"), ["a", "b"]

    def answer(*_: object, **__: object) -> io.BytesIO:
        if not there:
            raise OSError("refused")
        cards = [{"id": name, "root": f"/{name}", "parent": "base"} for name in there]
        return io.BytesIO(json.dumps({"data": [*cards, {"id": "base", "root": "/"}]}).encode())

    monkeypatch.setattr(watch, "urlopen", answer)
    assert server.adapters() == {"a": Path("/a"), "b": Path("/b")}
    for now, known in ((["a", "b", "c"], True), (["a", "b"], False), ([], False)):
        server.refused = {"x": "no room"}
        there[:] = now
        if now:
            assert set(server.adapters()) == set(now)
        else:
            with pytest.raises(OSError, match="refused"):
                server.adapters()
        assert bool(server.refused) is known


def test_watch_leaves_the_cores_to_the_servers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(member: Member) -> Path:
        seen.append(torch.get_num_threads())
        return vllm_adapter(member)

    monkeypatch.setattr(module, "vllm_adapter", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        words = ["watch", str(root), "--server", "http://127.0.0.1:9", "--once"]
        assert CliRunner().invoke(main, words).exit_code == 1  # no server is there
    finally:
        torch.set_num_threads(before)
    assert seen and set(seen) == {1}
