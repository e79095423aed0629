"""Identity is content: every byte that is served counts, and is read once."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters.certificate import FILE
from converters.errors import BaseError, OutputError, TargetError
from converters.files import hashes
from converters.files.cache import private_cache
from converters.files.hashes import file_hash
from converters.files.tensors import LazyTensor
from converters.lint import lint
from converters.model.base import open_base
from converters.targets.onnx import add_adapters
from dora_serve import merge, read_run, write_adapter
from dora_serve.batch import plan_batch
from dora_serve.batch.convert import convert
from dora_serve.commands import dora_export, dora_serve
from dora_serve.folder.cache import cached, content_key
from dora_serve.folder.inventory import discover, read_member
from dora_serve.folder.pairing import is_named
from dora_serve.proof.check import check
from dora_serve.server.prepare.make import _base_key, make_offer
from dora_serve.vllm.convert import vllm_adapter
from dora_serve.vllm.fleet import plan_fleet
from tests.conftest import MODELS, tiny_llama

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settle() -> None:
    """Until what was written is no longer taken for what may be being written."""
    time.sleep(hashes._SETTLED / 1e9 + 0.02)


def rewritten(base: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(base, out)
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


def flip(path: Path, at: float = 1.0) -> None:
    """Another value of one bit, in a file of the same size."""
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(len(data) * at))] ^= 1
    path.write_bytes(data)


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

    def counted(self: hashes.TensorHashes, tensor: LazyTensor) -> None:
        hashed.append(tensor.name)
        original(self, tensor)

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


def test_the_cache_is_the_users_alone(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()

    cached("key", make)
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700
    own_cache.chmod(0o777)
    cached("key", make)
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700

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


DAMAGE: Mapping[str, Callable[[Path], object]] = {
    "a bit": lambda folder: flip(folder / "a"),
    "a file of the same size and time": quietly_changed,
    "a file is gone": gone,
    "empty": emptied,
    "a file more": added,
    "a link": linked,
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


def test_an_adapter_for_vllm_that_was_changed_is_converted_anew(
    llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_adapter(llama_lora, out, base=llama_base, target="vllm")
    base = open_base(llama_base)
    assert vllm_adapter(read_member("out", out, [base])) == out
    settle()
    assert vllm_adapter(read_member("out", out, [base])) == out
    flip(out / "adapter_model.safetensors")
    anew = vllm_adapter(read_member("out", out, [base]))
    assert anew != out
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


@pytest.fixture
def of_another(llama_base: Path, llama_lora: Path, tmp_path: Path) -> Path:
    """A folder with a base and an adapter of its shapes that names another one."""
    world = tmp_path / "world"
    shutil.copytree(llama_base, world / "mine")
    run = Path(shutil.copytree(llama_lora, world / "run"))
    config = run / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": "org/theirs"}
    config.write_text(json.dumps(said))
    return world


def output_of(command: object, *words: object) -> str:
    done = CliRunner().invoke(command, [str(word) for word in words])  # type: ignore[arg-type]
    assert done.exit_code == 0, done.output
    return done.output


WARNS = "the run names org/theirs as its base; it goes with"


@pytest.mark.parametrize(
    "words",
    [("merge",), ("adapter",), ("adapter", "--target", "vllm"), ("merge", "--dry-run")],
    ids=" ".join,
)
def test_another_base_only_when_it_is_given_and_then_with_a_warning(
    words: tuple[str, ...], of_another: Path, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    verb, *options = words
    given = ["--base", of_another / "mine", *options]
    told = output_of(dora_export, verb, of_another / "run", tmp_path / "out", *given)
    assert told.count(WARNS) == 1
    silent = output_of(
        dora_export, verb, llama_lora, tmp_path / "own", "--base", llama_base, *options
    )
    assert "as its base" not in silent
    if verb == "merge":
        bare = CliRunner().invoke(
            dora_export, ["merge", str(of_another / "run"), str(tmp_path / "bare")]
        )
        assert bare.exit_code == 1
        assert not (tmp_path / "bare").exists()


def test_the_library_warns_as_the_command_line_does(of_another: Path, tmp_path: Path) -> None:
    result = merge(of_another / "run", tmp_path / "out", base=of_another / "mine")
    assert sum(WARNS in warning for warning in result.warnings) == 1
    assert WARNS in (tmp_path / "out" / FILE).read_text()


def test_up_and_plan_list_it_as_not_served(of_another: Path) -> None:
    found = discover(of_another)
    offer = make_offer(of_another, None, True, print)
    assert [model.name for model in offer.models] == ["mine"]
    for problems in (found.problems, offer.problems, plan_fleet(found).problems):
        assert "the run names org/theirs" in problems["run"]
    plan = json.loads(output_of(dora_serve, "plan", of_another, "--json"))
    assert "the run names org/theirs" in plan["problems"]["run"]
    assert [pool["name"] for pool in plan["pools"]] == ["mine"]
    up = output_of(dora_serve, "up", of_another, "--engine", "vllm", "--dry-run")
    assert "left out: run" in up


def test_a_base_that_is_not_served_is_listed_with_its_reason(
    of_another: Path, llama_base: Path, roberta_base: Path
) -> None:
    for name in ("second", "third"):
        shutil.copytree(llama_base, of_another / name)
    shutil.copytree(roberta_base, of_another / "masks")
    given = discover(of_another, of_another / "mine")
    fleet = plan_fleet(given)
    assert [pool.name for pool in fleet.pools] == ["mine"]
    assert {"second", "third", "masks"} <= fleet.problems.keys()
    shutil.rmtree(of_another / "run")
    alone = plan_fleet(discover(of_another, of_another / "mine"))
    assert [pool.name for pool in alone.pools] == ["mine"]
    assert {"second", "third", "masks"} <= alone.problems.keys()
    offer = make_offer(of_another, None, True, print)
    named = {model.name for model in offer.models} | offer.problems.keys()
    assert named == {"mine", "second", "third", "masks"}
