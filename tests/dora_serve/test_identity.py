"""Identity is content: every byte that is served counts, and is read once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from converters.certificate import FILE
from converters.errors import BaseError, TargetError
from converters.files import hashes
from converters.files.cache import private_cache
from converters.files.hashes import file_hash
from converters.files.tensors import LazyTensor
from converters.lint import lint
from converters.model.base import open_base
from converters.targets.onnx import add_adapters, decoder
from dora_serve import merge, read_run, write_adapter, write_onnx
from dora_serve.batch import plan_batch
from dora_serve.batch.convert import convert
from dora_serve.folder.cache import content_key
from dora_serve.folder.inventory import discover, read_member
from dora_serve.folder.pairing import is_named
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.proof.check import check
from dora_serve.server.prepare.make import _base_key, make_offer
from dora_serve.vllm.convert import vllm_adapter
from dora_serve.vllm.fleet import plan_fleet
from tests.conftest import MODELS, tiny_llama
from tests.dora_serve.damage import flip, settle

BASE = MODELS / "tiny-llama-base"
WEIGHTS = "model.safetensors"


NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rewritten(base: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(base, out)
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


def negated(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "norm" in name:
            tensors[name].neg_()


def one_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][61] *= -50


def one_element(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][17, 29] += 1


CHANGES = [negated, one_row, one_element]


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_differs_anywhere_is_another(
    change: Callable[[dict[str, torch.Tensor]], object],
    llama_base: Path,
    llama_lora: Path,
    tmp_path: Path,
) -> None:
    """In norms, in one row, in one element: for the cache, a certificate, lint, and a name."""
    same = open_base(rewritten(llama_base, tmp_path / "same" / "base", lambda _: None))
    other = open_base(rewritten(llama_base, tmp_path / "other" / "base", change))
    base, run = open_base(llama_base), read_run(llama_lora)
    assert _base_key(same, ["x"]) == _base_key(base, ["x"]) != _base_key(other, ["x"])
    assert content_key(run, same) == content_key(run, base) != content_key(run, other)
    write_adapter(llama_lora, tmp_path / "adapter", base=llama_base)
    assert check(tmp_path / "adapter", same).passed
    assert not check(tmp_path / "adapter", other).passed
    assert not [f for f in lint(tmp_path / "adapter", same) if f.check == "fingerprint"]
    assert [f for f in lint(tmp_path / "adapter", other) if f.check == "fingerprint"]
    assert is_named(str(llama_base), same)
    assert not is_named(str(llama_base), other)


def test_a_graph_takes_no_adapters_of_a_base_with_other_norms(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """By its certificate, which is all that is asked before."""
    graph = tmp_path / "graph"
    (graph / "adapters").mkdir(parents=True)
    (graph / "model.onnx").touch()
    known = open_base(llama_base).fingerprint
    proof = {"base": {"fingerprint": dict(known)}, "adapters": {}}
    (graph / FILE).write_text(json.dumps(proof))
    other = open_base(rewritten(llama_base, tmp_path / "other", negated))
    with pytest.raises(TargetError, match="made from another base") as raised:
        add_adapters(graph, {"a": read_run(llama_lora)}, other)
    assert "norm" in str(raised.value.tensor)


def test_the_fingerprint_is_of_every_byte(llama_base: Path) -> None:
    """Against BLAKE3 of the bytes as safetensors itself reads them."""
    known = open_base(llama_base).fingerprint
    tensors = load_file(llama_base / WEIGHTS)
    assert known.keys() == tensors.keys()
    for name, tensor in tensors.items():
        said = f"{tensor.dtype} {list(tensor.shape)}".encode()
        assert known[name] == blake3(said + tensor.numpy().tobytes()).hexdigest()
    assert len({*known.values()}) > 10


def test_how_the_tensors_lie_in_files_is_no_difference(llama_base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "shards", max_shard_size="14KB")
    shutil.copytree(llama_base, tmp_path / "bin")
    torch.save(load_file(llama_base / WEIGHTS), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / WEIGHTS).unlink()
    known = open_base(llama_base).fingerprint
    assert len(open_base(tmp_path / "shards").shards) > 1
    assert open_base(tmp_path / "shards").fingerprint == known
    assert open_base(tmp_path / "bin").fingerprint == known
    model.bfloat16().save_pretrained(tmp_path / "narrow")
    assert open_base(tmp_path / "narrow").unlike(known) == sorted(known)


def test_a_base_is_hashed_once_for_each_of_its_states(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(llama_base, tmp_path / "not called as in the run"))
    hashed: list[str] = []
    original = hashes.TensorHashes._hash

    def counted(self: hashes.TensorHashes, tensor: LazyTensor, **how: Any) -> None:
        hashed.append(tensor.name)
        original(self, tensor, **how)

    monkeypatch.setattr(hashes.TensorHashes, "_hash", counted)
    settle()
    merge(llama_lora, tmp_path / "one", base=base)  # beside the copy
    assert sorted(hashed) == sorted(open_base(base).tensors)
    merge(llama_lora, tmp_path / "two", base=base)
    write_adapter(llama_lora, tmp_path / "adapter", base=base)
    assert check(tmp_path / "one", base).passed
    content_key(read_run(llama_lora), open_base(base))
    assert len(hashed) == len(open_base(base).tensors)

    times = (base / WEIGHTS).stat()
    flip(base / WEIGHTS)
    os.utime(base / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had been
    assert (base / WEIGHTS).stat().st_mtime_ns == times.st_mtime_ns
    assert not check(tmp_path / "one", base).passed
    assert len(hashed) == 2 * len(open_base(base).tensors)


def test_what_may_still_be_written_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_hash(path) == blake3(b"one").hexdigest()
    assert not (private_cache() / "hashes").exists()
    settle()
    assert file_hash(path) == blake3(b"one").hexdigest()
    (memory,) = (private_cache() / "hashes").iterdir()
    memory.write_text('"believed"')
    assert file_hash(path) == "believed"
    memory.write_text('"bro')  # a crash of the machine
    assert file_hash(path) == blake3(b"one").hexdigest()
    path.write_bytes(b"two")
    assert file_hash(path) == blake3(b"two").hexdigest()


def test_a_merge_needs_no_cache(
    llama_base: Path, llama_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "file" / "below"))
    merge(llama_lora, tmp_path / "out", base=llama_base)
    assert check(tmp_path / "out", llama_base).passed


def test_an_adapter_for_vllm_that_was_changed_is_converted_anew(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_adapter(llama_lora, out, base=llama_base, target="vllm")
    base = open_base(llama_base)
    copied = vllm_adapter(read_member("out", out, [base]))
    assert copied != out
    as_it_was = (out / "adapter_model.safetensors").read_bytes()
    assert (copied / "adapter_model.safetensors").read_bytes() == as_it_was
    settle()
    assert vllm_adapter(read_member("out", out, [base])) == copied
    flip(out / "adapter_model.safetensors")
    anew = vllm_adapter(read_member("out", out, [base]))
    assert anew not in (out, copied)
    assert (copied / "adapter_model.safetensors").read_bytes() == as_it_was
    weights = load_file(out / "adapter_model.safetensors")
    assert load_file(anew / "adapter_model.safetensors").keys() == weights.keys()


def test_what_lies_below_a_base_is_part_of_what_is_made_of_it(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    """Templates that go along, for a graph that is kept, and for a batch that is done again."""
    base = Path(shutil.copytree(llama_base, tmp_path / "base"))
    template = base / "additional_chat_templates" / "tool.jinja"
    template.parent.mkdir()
    template.write_text("old")
    shutil.copytree(llama_lora, tmp_path / "runs" / "run")

    def keys() -> tuple[str, str]:
        (job,) = plan_batch(
            tmp_path / "runs", tmp_path / "out", base=str(base), to="merged", force=True
        ).jobs
        done = convert(job)
        assert done is not None and done.state == "done" and done.input is not None, done
        return _base_key(open_base(base), ["causal-lm"]), done.input

    before = keys()
    assert keys() == before
    template.write_text("new")
    after = keys()
    assert after[0] != before[0] and after[1] != before[1]


@pytest.fixture
def in_float32(tmp_path: Path) -> Path:
    """A base in bfloat16, and a run in the reference layout that was trained on it in float32."""
    world = tmp_path / "world"
    shutil.copytree(MODELS / "tiny-llama-base", world / "base")
    weights = world / "base" / WEIGHTS
    save_file({n: t.bfloat16() for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    config = world / "base" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    for kind in ("Checkpoint", "Log"):
        place = f"runs/{kind}/Tiny_Llama/Lora_Rank=8/Count_Down"
        shutil.copytree(MODELS / place, world / place)
    (run,) = (world / "runs" / "Checkpoint").rglob(WEIGHTS)
    tensors = {n: t if "lora" in n else t.bfloat16().float() for n, t in load_file(run).items()}
    save_file(tensors, run, {"format": "pt"})
    return world


def test_the_dtype_of_a_frozen_copy_is_no_other_base(in_float32: Path, tmp_path: Path) -> None:
    found = discover(in_float32)
    assert not found.problems
    (name,) = found.members
    assert found.members[name].base is found.bases["base"]
    (pool,) = plan_fleet(found).pools
    assert list(pool.ranks) == [name]
    offer = make_offer(in_float32, None, True, print)
    assert not offer.problems
    assert {(m.name, m.base) for m in offer.models} == {("base", None), (name, "base")}
    plan = plan_batch(in_float32, tmp_path / "out")
    assert [job.name for job in plan.jobs] == [name]
    assert not plan.problems
    merged = merge(found.members[name].path, tmp_path / "merged", base=in_float32 / "base")
    assert merged.written


@pytest.mark.parametrize("change", CHANGES)
def test_other_frozen_weights_are_another_base(
    in_float32: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """The control of the one before: norms too, which no update is on."""
    assert discover(in_float32).members
    weights = in_float32 / "base" / WEIGHTS
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, {"format": "pt"})
    found = discover(in_float32)
    assert not found.members
    (problem,) = found.problems.values()
    assert "the run's base is not known" in problem
    (run,) = (in_float32 / "runs" / "Checkpoint").glob("*/*/*/*")
    with pytest.raises(BaseError, match="frozen weights differ"):
        read_member("run", run, [], open_base(in_float32 / "base"))


@pytest.mark.parametrize("changed", [WEIGHTS, "config.json", "tokenizer_config.json"])
def test_a_graph_of_a_base_that_was_exchanged_meanwhile_is_not_kept(
    tmp_path: Path, changed: str
) -> None:
    """Who builds it is given the folder's path: the cache would have it by another base's name."""
    base, other = tmp_path / "root" / "base", tmp_path / "other"
    shutil.copytree(BASE, base)
    rewritten(BASE, other, negated)
    for name in ("config.json", "tokenizer_config.json"):
        said = json.loads((BASE / name).read_text())
        (other / name).write_text(json.dumps({**said, "rms_norm_eps": 0.1}))

    def exchange(text: str) -> None:
        assert "graph" in text
        shutil.copyfile(other / changed, tmp_path / "new")
        (tmp_path / "new").replace(base / changed)

    offer = make_offer(tmp_path / "root", None, False, exchange)
    assert offer.models == [] and "changed while it was read" in offer.problems["base"]
    shutil.copyfile(BASE / changed, base / changed)
    offer = make_offer(tmp_path / "root", None, False, lambda _: None)
    assert offer.problems == {}
    found = Decoder(offer.graphs[0].folder, threads=1)
    (answer,) = found.generate([found.encode("count : nine")], None, Sampling(max_tokens=5))
    assert answer.text.startswith(" ten eleven")


def test_a_graph_of_a_base_that_is_exchanged_meanwhile_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    base = open_base(folder)
    assert base.fingerprint  # as a certificate would tell it
    build = decoder.build_decoder

    def exchanged(*given: Any, **more: Any) -> None:
        shutil.copyfile(rewritten(BASE, tmp_path / "other", negated) / WEIGHTS, folder / WEIGHTS)
        build(*given, **more)

    monkeypatch.setattr("converters.targets.onnx.write.build_decoder", exchanged)
    with pytest.raises(BaseError, match="changed while it was read"):
        write_onnx(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_another_disk_in_the_place_of_one_whose_times_are_alike(tmp_path: Path) -> None:
    """As images of two versions of a model, made to be the same whenever they are made. The first
    one's hash was remembered for the second, and the first was served."""
    made, place = [], tmp_path / "place"
    place.mkdir()
    for content in (b"one version", b"the other!!"):
        source = tmp_path / content.decode()
        source.mkdir()
        (source / "weights").write_bytes(content)
        os.utime(source / "weights", (1_700_000_000, 1_700_000_000))
        image = source.with_suffix(".img")
        always = {**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000"}
        words = ["mke2fs", "-qt", "ext2", "-I", "128", "-d", str(source), str(image), "1m"]
        when = ["debugfs", "-wR", "set_inode_field /weights ctime 20231114221320", str(image)]
        try:
            for command in (words, when):
                subprocess.run(command, check=True, capture_output=True, env=always)
            subprocess.run(
                ["mount", "-oloop,ro", str(image), str(place)], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no image can be made, or mounted, here")
        try:
            found = (place / "weights").stat()
            made.append((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
            assert file_hash(place / "weights") == blake3(content).hexdigest()
        finally:
            subprocess.run(["umount", str(place)], check=True)
    assert made[0] == made[1]
