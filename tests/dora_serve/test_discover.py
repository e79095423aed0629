"""What a folder holds, by name and base; and artifacts that are made once."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from converters.errors import BaseError, MissingError, RunError
from converters.model.base import open_base
from dora_serve import read_run
from dora_serve.folder.cache import cached, content_key, member_key
from dora_serve.folder.inventory import discover, read_member
from dora_serve.vllm.desired import Following
from tests.conftest import MODELS, tiny_llama
from tests.dora_serve.following import find_run


def test_everything_in_models_has_its_base() -> None:
    found = discover(MODELS)
    assert set(found.bases) == {"tiny-llama-base", "tiny-roberta-base"}
    bases = {name: member.base.path.name for name, member in found.members.items()}
    assert bases == {
        "Tiny_Llama--Count_Down--1": "tiny-llama-base",
        "Tiny_Llama--Every_Second--1": "tiny-llama-base",
        "Tiny_Roberta--Sentiment--1": "tiny-roberta-base",
        "Tiny_Roberta--Sentiment--1--accelerate=0.22": "tiny-roberta-base",
    }
    assert not found.problems
    assert not found.onnx
    own = {member.name for member in found.of(found.bases["tiny-llama-base"])}
    assert own == {"Tiny_Llama--Count_Down--1", "Tiny_Llama--Every_Second--1"}


def test_a_name_that_two_folders_have_is_their_path(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama_base, tmp_path / "base")
    for experiment in ("one", "two"):
        shutil.copytree(llama_lora, tmp_path / experiment / "checkpoint-9")
    shutil.copytree(llama_lora, tmp_path / "alone")
    found = discover(tmp_path)
    assert set(found.members) == {"one/checkpoint-9", "two/checkpoint-9", "alone"}
    assert find_run(tmp_path, "alone") == tmp_path / "alone"
    assert find_run(tmp_path, "one/checkpoint-9") == tmp_path / "one" / "checkpoint-9"
    assert find_run(tmp_path, "checkpoint-9") is None
    assert find_run(tmp_path, "base") is None


def test_nothing_outside_is_found(llama_lora: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(llama_lora, tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    assert not discover(root).members
    for name in ("link", "../outside", str(tmp_path / "outside"), ".", "", "a\0b", "x" * 9999):
        assert find_run(root, name) is None, name


def test_two_bases_that_fit_are_told_apart_by_name_or_not_at_all(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """The adapter names no base that is here; twins of its base both fit."""
    shutil.copytree(llama_lora, tmp_path / "lora")
    for name in ("a", "b"):
        shutil.copytree(llama_base, tmp_path / name)
    found = discover(tmp_path)
    assert "the run's base is not known" in found.problems["lora"]
    assert "2 bases fit" in found.problems["lora"]
    assert discover(tmp_path, llama_base).members["lora"].base.path == llama_base
    shutil.move(tmp_path / "b", tmp_path / "base")  # the name in adapter_config.json
    assert discover(tmp_path).members["lora"].base.path == tmp_path / "base"


def test_a_copy_of_the_base_that_is_named_goes_by_any_name(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama_lora, tmp_path / "lora")
    tiny_llama(initializer_range=0.1).save_pretrained(tmp_path / "other")
    found = discover(tmp_path)
    assert "one base fits: other" in found.problems["lora"]
    assert f"--base {tmp_path / 'other'}" in found.problems["lora"]
    shutil.copytree(llama_base, tmp_path / "copy")
    member = discover(tmp_path).members["lora"]
    assert member.base.path == tmp_path / "copy" and member.run.warnings == ()
    assert discover(tmp_path, tmp_path / "other").members["lora"].run.warnings != ()


def test_a_checkpoint_belongs_to_the_base_whose_weights_it_carries(
    dora_run: Path, llama_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_llama(initializer_range=0.1).save_pretrained(other)
    bases = [open_base(other), open_base(llama_base)]
    assert read_member("run", dora_run, bases).base.path == llama_base
    with pytest.raises(BaseError, match="not known"):
        read_member("run", dora_run, [open_base(other)])


def test_a_broken_run_is_a_problem_and_the_rest_is_served(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama_base, tmp_path / "base")
    shutil.copytree(llama_lora, tmp_path / "good")
    broken = Path(shutil.copytree(llama_lora, tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    found = discover(tmp_path)
    assert set(found.members) == {"good"}
    assert "adapter_model.safetensors" in found.problems["broken"]
    with pytest.raises(MissingError):
        discover(tmp_path / "nowhere")


def test_a_run_that_is_exchanged_while_it_is_read(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of the one run under the name of the other would be served from then on."""
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    run = Path(shutil.copytree(llama_lora, tmp_path / "run"))
    member = read_member("run", run, [open_base(llama_base)])
    assert member_key(member) == member_key(member)
    config = run / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    with pytest.raises(RunError, match="changed while"):
        member_key(member)
    shutil.rmtree(run)
    with pytest.raises(MissingError, match="file not found"):
        member_key(member)


def test_folders_that_come_and_go_while_they_are_looked_for(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    root, away = tmp_path / "root", tmp_path / "away"
    for number in range(4):
        shutil.copytree(llama_lora, away / str(number))
    root.mkdir()
    stop = threading.Event()

    def moving() -> None:
        while not stop.is_set():
            for run in sorted(away.iterdir()):
                run.rename(root / run.name)
            for run in sorted(root.iterdir()):
                run.rename(away / run.name)

    with ThreadPoolExecutor(1) as pool:
        mover = pool.submit(moving)
        try:
            for _ in range(40):
                discover(root, llama_base)
                find_run(root, "2")
        finally:
            stop.set()
        mover.result()
    assert set(discover(away, llama_base).members) == {"0", "1", "2", "3"}


def test_nothing_is_looked_for_in_hidden_folders(llama_base: Path, tmp_path: Path) -> None:
    for place in ("root/base", "root/.cache/other", "root/.other"):
        shutil.copytree(llama_base, tmp_path / place)
    found = discover(tmp_path / "root")
    assert (set(found.bases), set(found.problems)) == ({"base"}, set())


@pytest.mark.parametrize("how", ["one file", "shards", "torch", "an index alone"])
def test_however_a_base_is_stored(how: str, tmp_path: Path) -> None:
    base = tmp_path / "root" / "base"
    size = "5GB" if how in ("one file", "torch") else "12KB"
    tiny_llama().save_pretrained(base, max_shard_size=size)
    assert (base / "model.safetensors").exists() is (size == "5GB")
    if how == "torch":
        torch.save(tiny_llama().state_dict(), base / "pytorch_model.bin")
    for file in base.glob("*.safetensors") if how in ("torch", "an index alone") else ():
        file.unlink()
    found = discover(tmp_path / "root")
    assert (set(found.bases), set(found.problems)) == (
        (set(), {"base"}) if how == "an index alone" else ({"base"}, set())
    )


def test_the_key_follows_content_base_and_options(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    base = open_base(llama_base)
    copy = Path(shutil.copytree(llama_lora, tmp_path / "copy"))
    key = content_key(read_run(llama_lora), base, target="vllm")
    assert content_key(read_run(copy), base, target="vllm") == key
    assert content_key(read_run(copy), base, target="peft") != key
    tiny_llama(initializer_range=0.1).save_pretrained(tmp_path / "other")
    assert content_key(read_run(copy), open_base(tmp_path / "other"), target="vllm") != key
    weights = copy / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert content_key(read_run(copy), base, target="vllm") != key
    run, changes = read_run(llama_lora), ({"options": {"lora_alpha": 1.0}}, {"method": "other"})
    for change in changes:
        assert content_key(replace(run, **change), base, target="vllm") != key
    monkeypatch.setattr("dora_serve.folder.cache.tool", lambda: "another version")
    assert content_key(run, base, target="vllm") != key


def test_what_many_want_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path))
    made, ready = [], threading.Barrier(8)

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.1)
        folder.mkdir()

    def want(_: int) -> Path:
        ready.wait()
        return cached("key", make)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(want, range(8))) == {tmp_path / "key"}
    assert made == [tmp_path / "key"]


def test_a_link_out_of_the_folder_is_told(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """Where it leads to a run, a base, or a folder of such. It is not followed, and renames nothing
    that lies in the folder."""
    root, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    for name in ("run", "runs/two"):
        shutil.copytree(llama_lora, root / name)
        shutil.copytree(llama_lora, elsewhere / name)
    shutil.copytree(llama_base, elsewhere / "base")
    (elsewhere / "data" / "train").mkdir(parents=True)
    for name in ("base", "data"):
        (root / name).symlink_to(elsewhere / name)
    (root / "two").symlink_to(elsewhere / "run")
    (root / "linked").symlink_to(elsewhere / "runs")
    (root / "again").symlink_to(root / "run")
    (root / "nowhere").symlink_to("nothing")
    found = discover(root, llama_base)
    assert set(found.members) == {"run", "two"}
    assert found.problems.keys() == {"linked", "base", str(root / "two")}
    followed = Following(root, given=open_base(llama_base)).at_rest()
    assert set(followed.adapters) == {"run", "two"}
    assert followed.problems == found.problems
    for why in found.problems.values():
        assert why.startswith("a link out of the folder")
