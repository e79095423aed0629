"""Merges of made-up bases against float64, tensor by tensor, and all that lies beside them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import BaseError, OutputError, RunError
from converters.files.output import JOURNAL
from converters.files.tensors import open_file
from converters.run import Run
from converters.targets.merged.stream import Rounding
from converters.updates.magnitude import MagnitudeUpdate
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update
from dora_serve import merge

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 6}
WEIGHTS = "model.safetensors"


# A class that transformers does not have, whose parts are told by the configuration alone.
OTHER = {"architectures": ["PartsForCausalLM"], "model_type": "parts"}


def make_base(folder: Path, *shards: Mapping[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / WEIGHTS, {"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(dict(tensors), folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def make_run(folder: Path, updates: Mapping[str, Update], **more: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, "test", updates, **more)


@dataclass(frozen=True)
class Dense:
    """An update that is a matrix ΔW and not a sum of components."""

    delta: torch.Tensor
    whole: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    def components(self) -> None:
        return None

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return rows.add_(self.delta[start : start + rows.shape[0]])


def low_rank(out: int, inn: int, rank: int = 2, seed: int = 0, size: float = 1.0) -> RankOneSum:
    generator = torch.Generator().manual_seed(seed)
    return RankOneSum(
        torch.randn(rank, inn, generator=generator),
        size * torch.linspace(1, 2, rank),
        torch.randn(out, rank, generator=generator),
    )


def certificate(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "dora_export.json").read_text())
    return value


def truth(weight: torch.Tensor, update: RankOneSum, transposed: bool = False) -> np.ndarray:
    a, c, b = (part.double().numpy() for part in (update.a, update.c, update.b))
    delta = (b * c) @ a
    expected: np.ndarray = weight.double().numpy() + (delta.T if transposed else delta)
    return expected


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(found.double().numpy() - expected) <= 4e-6 * scale).all()


def rounded(weight: torch.Tensor, update: RankOneSum, dtype: torch.dtype) -> torch.Tensor:
    """The float32 merge, rounded once."""
    return (weight.float().addmm(update.b * update.c, update.a)).to(dtype)


# --- the bytes of the tensors

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 900])
def test_tensors_of_several_blocks(
    tmp_path: Path, rows: int, dtype: torch.dtype, wanted: torch.dtype | None
) -> None:
    """900 rows of 700 are two blocks, the second shorter; other tensors stand before and behind."""
    torch.manual_seed(rows)
    tensors = {
        "a.weight": torch.randn(3).to(dtype),
        f"{Q}.weight": torch.randn(rows, 700).to(dtype),
        "z.steps": torch.arange(5),
        "z.weight": torch.randn(4, 3, 2).to(dtype),
    }
    base = make_base(tmp_path / "base", tensors)
    update = low_rank(rows, 700, min(rows, 2))
    merge(make_run(tmp_path / "run", {Q: update}), tmp_path / "out", base=base, dtype=wanted)
    out = wanted or dtype
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found.keys() == tensors.keys()
    merged = found.pop(f"{Q}.weight")
    assert merged.dtype == out
    if out == torch.float32:
        assert_close(merged, truth(tensors[f"{Q}.weight"], update))
    else:
        off = merged != rounded(tensors[f"{Q}.weight"], update.strip().reduced().sorted(), out)
        assert int(off.sum()) <= merged.numel() // 1000  # sums in another order round differently
        assert_rounds(merged, truth(tensors[f"{Q}.weight"], update))
    for name, tensor in found.items():
        expected = tensors[name].to(out) if tensors[name].is_floating_point() else tensors[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def assert_rounds(found: torch.Tensor, expected: np.ndarray) -> None:
    """Every element is within a unit of its last place of the truth."""
    step = torch.finfo(found.dtype).eps
    gap = np.abs(found.double().numpy() - expected)
    assert (gap <= step * np.abs(expected) + 1e-5).all()


@pytest.mark.parametrize("kind", ["low rank", "dense", "magnitude"])
@pytest.mark.parametrize("square", [True, False])
def test_weights_stored_as_in_out(tmp_path: Path, kind: str, square: bool) -> None:
    out, inn = (12, 12) if square else (800, 900)
    module, weight = "transformer.h.0.attn.c_attn", torch.randn(inn, out)
    base = make_base(
        tmp_path / "base",
        {f"{module}.weight": weight},
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
    )
    delta = low_rank(out, inn)
    expected = truth(weight, delta, transposed=True)
    update: Update = delta
    if kind == "dense":
        update = Dense(delta.dense())
    if kind == "magnitude":
        magnitude = torch.rand(out) + 1
        update = MagnitudeUpdate(magnitude, delta)
        expected = expected / np.linalg.norm(expected, axis=0) * magnitude.double().numpy()
    merge(make_run(tmp_path / "run", {module: update}), tmp_path / "out", base=base)
    assert_close(load_file(tmp_path / "out" / WEIGHTS)[f"{module}.weight"], expected)


def test_a_square_weight_of_another_family_is_not_turned(tmp_path: Path) -> None:
    module, weight = "transformer.h.0.attn.c_attn", torch.randn(12, 12)
    update = low_rank(12, 12)
    for number, (name, kind) in enumerate([(module, "llama"), ("transformer.h.0.other", "gpt2")]):
        base = make_base(tmp_path / f"base{number}", {f"{name}.weight": weight}, model_type=kind)
        run = make_run(tmp_path / "run", {name: update})
        merge(run, tmp_path / f"out{number}", base=base)
        found = load_file(tmp_path / f"out{number}" / WEIGHTS)[f"{name}.weight"]
        assert_close(found, truth(weight, update))


def test_large_tensors_are_copied_to_the_last_byte(tmp_path: Path) -> None:
    size = (64 << 20) + 1000
    data = (torch.arange(size, dtype=torch.int32) % 251).to(torch.uint8)
    base = make_base(
        tmp_path / "base", {"big": data, f"{Q}.weight": torch.zeros(4, 4), "after": torch.ones(3)}
    )
    told: list[int] = []
    totals: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Any]:
        totals.append(total)
        yield told.append

    result = merge(
        make_run(tmp_path / "run", {Q: low_rank(4, 4)}),
        tmp_path / "out",
        base=base,
        progress=progress,
    )
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(found["big"], data)
    assert torch.equal(found["after"], torch.ones(3))
    assert sum(told) == totals[0] == result.plan.nbytes == size + 64 + 12
    assert sorted(told) == [12, 64, 1000, 64 << 20]


def test_between_file_systems(tmp_path: Path) -> None:
    """The kernel copies within one file system; elsewhere it is read and written."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system")
    data = (torch.arange(3 << 20, dtype=torch.int32) % 251).to(torch.uint8)
    base = make_base(tmp_path / "base", {"x": torch.ones(3), "big": data})
    target = other / f"merge-{os.getpid()}"
    try:
        merge(make_run(tmp_path / "run", {}), target, base=base)
        assert torch.equal(load_file(target / WEIGHTS)["big"], data)
        assert torch.equal(load_file(target / WEIGHTS)["x"], torch.ones(3))
    finally:
        for path in target.glob("*"):
            path.unlink()
        target.rmdir()


@pytest.mark.parametrize("count", [1, 2, 9, 20])
@pytest.mark.parametrize("resume", [True, False])
def test_bases_of_many_shards(tmp_path: Path, count: int, resume: bool) -> None:
    shards = [
        {f"model.layers.{n}.q_proj.weight": torch.randn(4, 6), f"n{n}.weight": torch.randn(n)}
        for n in range(count)
    ]
    base = make_base(tmp_path / "base", *shards)
    updates = {f"model.layers.{n}.q_proj": low_rank(4, 6, seed=n) for n in range(count)}
    threads = torch.get_num_threads()
    run = make_run(tmp_path / "run", updates)
    merge(run, tmp_path / "out", base=base, resume=resume)
    assert torch.get_num_threads() == threads
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    index = tmp_path / "out" / "model.safetensors.index.json"
    if count == 1:
        assert not index.exists()
    else:
        own = json.loads((base / index.name).read_text())["weight_map"]
        said = json.loads(index.read_text())
        assert said["weight_map"] == own
        size = sum(t.numel() * 4 for shard in shards for t in shard.values())
        assert said["metadata"] == {"total_size": size}
    for file, shard in zip(files, shards, strict=True):
        found = load_file(tmp_path / "out" / file)
        assert found.keys() == shard.keys()
        for name, tensor in shard.items():
            module = name.removesuffix(".weight")
            if module in updates:
                assert_close(found[name], truth(tensor, updates[module]))
            else:
                assert torch.equal(found[name], tensor)
    assert set(certificate(tmp_path / "out")["modules"]) == set(updates)


def test_the_header_is_aligned_and_says_its_format(tmp_path: Path) -> None:
    for length in range(1, 9):
        base = make_base(tmp_path / f"base{length}", {"x" * length: torch.ones(2)})
        merge(make_run(tmp_path / "run", {}), tmp_path / f"out{length}", base=base)
        raw = (tmp_path / f"out{length}" / WEIGHTS).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        assert size % 8 == 0 and size - len(raw[8 : 8 + size].rstrip()) < 8
        assert json.loads(raw[8 : 8 + size])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_weights_that_the_output_cannot_hold(tmp_path: Path, bad: float) -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = bad
    weight[2, 1] = -bad
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2), "w": weight})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    with pytest.raises(BaseError, match="beyond the output dtype") as caught:
        merge(run, tmp_path / "out", base=base, dtype=torch.float16)
    assert (caught.value.file, caught.value.tensor) == (base / WEIGHTS, "w")
    assert not (tmp_path / "out").exists()


def test_finite_weights_whose_sum_is_not(tmp_path: Path) -> None:
    weight = torch.full((3, 4), 60000.0)
    base = make_base(tmp_path / "base", {f"{Q}.weight": weight})
    run = make_run(tmp_path / "run", {Q: low_rank(3, 4, size=1e-3)})
    merge(run, tmp_path / "out", base=base, dtype=torch.float16)
    assert bool((load_file(tmp_path / "out" / WEIGHTS)[f"{Q}.weight"] > 59000).all())


# --- what rounding took


def test_rounding_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30).bfloat16()
    base = make_base(tmp_path / "base", {f"{Q}.weight": weight, f"{K}.weight": torch.zeros(4, 4)})
    update = low_rank(40, 30, size=3e-3)
    run = make_run(
        tmp_path / "run", {Q: update, K: low_rank(4, 4)}, start_rank={Q: 8}, warnings=("told",)
    )
    result = merge(run, tmp_path / "out", base=base)
    delta = truth(weight * 0, update)
    found = load_file(tmp_path / "out" / WEIGHTS)[f"{Q}.weight"]
    stored = found.double().numpy() - weight.double().numpy()
    size = np.linalg.norm(delta)
    expected = {
        "cosine": (stored * delta).sum() / np.linalg.norm(stored) / size,
        "norm_ratio": np.linalg.norm(stored) / size,
        "lost": np.linalg.norm(stored - delta) / size,
    }
    modules = certificate(tmp_path / "out")["modules"]
    said = modules[Q]
    assert said["rounding"] == {
        key: pytest.approx(value, rel=1e-3) for key, value in expected.items()
    }
    relative = size / np.linalg.norm(weight.double().numpy())
    assert said["relative_update"] == pytest.approx(relative, rel=1e-3)
    assert (said["start_rank"], said["rank"]) == (8, 2)
    assert modules[K]["relative_update"] is None
    assert modules[K]["start_rank"] is None
    assert modules[K]["rounding"]["lost"] < 1e-6
    lost = said["rounding"]["lost"]
    assert 0.05 < lost < 1
    assert result.warnings[0] == "told"
    assert "1 of 2 modules" in result.warnings[1] and f"worst: {Q}" in result.warnings[1]
    assert f"{lost:.0%}" in result.warnings[1]


def test_what_rounding_says_at_its_ends() -> None:
    nothing = Rounding()
    assert (nothing.cosine, nothing.norm_ratio, nothing.lost) == (1.0, 1.0, 0.0)
    assert nothing.relative_update is None
    assert Rounding(4.0, 1.0, 0.0, 0.0).cosine == 0.0
    assert Rounding(4.0, 1.0, 0.0, 0.0).lost == 1.0
    assert Rounding(4.0, 1.0, 4.0, -2.0).cosine == -1.0
    assert Rounding(4.0, 1.0, 4.0, -2.0).lost == 3.0
    assert Rounding(4.0, 1.0, 4.0, 2.0).norm_ratio == 2.0
    assert Rounding(4.0, 1.0, 1.0, 1.0).relative_update == 0.5
    one = Rounding()
    for _ in range(2):
        one.add(torch.tensor([1.0, 2]), torch.tensor([3.0, 0]), torch.tensor([1.0, 1]))
    assert one == Rounding(10.0, 18.0, 4.0, 6.0)


def test_only_losses_over_five_percent_are_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.randn(8, 8)})
    result = merge(make_run(tmp_path / "run", {Q: low_rank(8, 8)}), tmp_path / "out", base=base)
    assert result.warnings == ()
    assert certificate(tmp_path / "out")["modules"][Q]["rounding"]["lost"] < 1e-5


# --- the configuration and the tensors beside the updates


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_names_the_dtype(tmp_path: Path, key: str) -> None:
    more = {"torch_dtype": "float32"} if key == "torch_dtype" else {}
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)}, **more)
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    merge(run, tmp_path / "out", base=base, dtype=torch.bfloat16)
    assert config_of(tmp_path / "out") == {**CONFIG, **more, key: "bfloat16"}
    merge(run, tmp_path / "same", base=base)
    assert config_of(tmp_path / "same") == {**CONFIG, **more}
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "same" / "dora_export.json").read_text())["dtype"] is None


def test_a_quantized_base_keeps_its_dtype(tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)}, quantization_config={"bits": 8}
    )
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    with pytest.raises(BaseError, match="quantized"):
        merge(run, tmp_path / "out", base=base, dtype=torch.bfloat16)
    merge(run, tmp_path / "out", base=base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_without_their_scales_take_no_update(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2).to(dtype)})
    with pytest.raises(BaseError, match="cannot take an update"):
        merge(make_run(tmp_path / "run", {Q: low_rank(2, 2)}), tmp_path / "out", base=base)


def test_two_modules_of_one_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2), Q.removeprefix("model."): low_rank(2, 2)})
    with pytest.raises(RunError, match="one module") as caught:
        merge(run, tmp_path / "out", base=base)
    assert caught.value.tensor == Q


def lazy(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "whole.safetensors")
    return open_file(folder / "whole.safetensors")


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tensors_trained_whole_take_their_places(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tensors = {
        EMBED: torch.randn(6, 4).bfloat16(),
        f"{Q}.weight": torch.randn(4, 4).bfloat16(),
        "model.norm.weight": torch.ones(4).bfloat16(),
        HEAD: torch.randn(6, 4).bfloat16(),
    }
    base = make_base(tmp_path / "base", tensors)
    whole = {"norm.weight": torch.full((4,), 2.0), HEAD: torch.randn(6, 4), "new": torch.randn(3)}
    run = make_run(tmp_path / "run", {Q: low_rank(4, 4)}, replaced=lazy(tmp_path / "run", whole))
    merge(run, tmp_path / "out", base=base, dtype=dtype)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert set(found) == {*tensors, "new"}
    out = dtype or torch.float32  # of what the run holds, where none is asked for
    assert torch.equal(found["model.norm.weight"], torch.full((4,), 2.0, dtype=out))
    assert torch.equal(found[HEAD], whole[HEAD].to(out))
    # What the base has not takes the dtype of its neighbours.
    assert torch.equal(found["new"], whole["new"].to(dtype or torch.bfloat16))
    assert torch.equal(found[EMBED], tensors[EMBED].to(dtype or torch.bfloat16))
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert set(said["base"]["fingerprint"]) == set(tensors)
    assert {*said["replaced"]} - {"norm.weight", "model.norm.weight"} == {HEAD, "new"}
    assert "merged" in (said.get("kind"), said.get("target"))
    assert config_of(tmp_path / "out").get("tie_word_embeddings") is not True


def test_replaced_tensors_that_are_the_bases_change_nothing(tmp_path: Path) -> None:
    tensors = {EMBED: torch.randn(6, 4), f"{Q}.weight": torch.randn(4, 4)}
    base = make_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    run = make_run(
        tmp_path / "run",
        {Q: low_rank(4, 4)},
        replaced=lazy(tmp_path / "run", {EMBED: tensors[EMBED], HEAD: tensors[EMBED].clone()}),
    )
    merge(run, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert set(found) == set(tensors)
    assert torch.equal(found[EMBED], tensors[EMBED])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True


@pytest.mark.parametrize("both", ["same", "different"])
def test_a_tied_pair_trained_whole(tmp_path: Path, both: str) -> None:
    tensors = {EMBED: torch.randn(6, 4), f"{Q}.weight": torch.randn(4, 4)}
    more = {"hidden_size": 4, "num_attention_heads": 1, "tie_word_embeddings": True}
    base = make_base(tmp_path / "base", tensors, **more)
    embed = torch.randn(9, 4)  # resized
    head = embed.clone() if both == "same" else torch.randn(9, 4)
    run = make_run(
        tmp_path / "run",
        {Q: low_rank(4, 4)},
        replaced=lazy(tmp_path / "run", {EMBED: embed, HEAD: head}),
    )
    merge(run, tmp_path / "out", base=base)
    found, config = load_file(tmp_path / "out" / WEIGHTS), config_of(tmp_path / "out")
    assert torch.equal(found[EMBED], embed)
    assert config["vocab_size"] == 9
    if both == "same":
        assert HEAD not in found
        assert config["tie_word_embeddings"] is True
    else:
        assert torch.equal(found[HEAD], head)
        assert config["tie_word_embeddings"] is False


def test_the_vocabulary_of_a_model_of_several_parts(tmp_path: Path) -> None:
    tensors = {EMBED: torch.randn(6, 4), HEAD: torch.randn(6, 4), f"{Q}.weight": torch.ones(4, 4)}
    text = {"vocab_size": 6, "other": 1}
    base = make_base(
        tmp_path / "base", tensors, text_config=text, tie_word_embeddings=False, **OTHER
    )
    whole = {EMBED: torch.randn(7, 4), HEAD: torch.randn(7, 4)}
    run = make_run(tmp_path / "run", {Q: low_rank(4, 4)}, replaced=lazy(tmp_path / "run", whole))
    merge(run, tmp_path / "out", base=base)
    config = config_of(tmp_path / "out")
    assert config["text_config"] == {"vocab_size": 7, "other": 1}
    assert config["vocab_size"] == 7


def test_an_update_of_a_tied_head_unties_it(tmp_path: Path) -> None:
    tensors = {EMBED: torch.randn(6, 4), f"{Q}.weight": torch.randn(4, 4)}
    base = make_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    update = low_rank(6, 4)
    run = make_run(tmp_path / "run", {"lm_head": update})
    merge(run, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(found[EMBED], tensors[EMBED])
    assert_close(found[HEAD], truth(tensors[EMBED], update))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_an_update_of_a_tied_embedding(tmp_path: Path, tied: bool, stored: bool) -> None:
    """`tied`: the update reaches the head too. `stored`: the head lies in the file all the same."""
    embed = torch.randn(6, 4)
    tensors = {EMBED: embed, f"{Q}.weight": torch.randn(4, 4)}
    if stored:
        tensors[HEAD] = embed.clone()
    base = make_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    update, module = low_rank(6, 4), "model.embed_tokens"
    run = make_run(
        tmp_path / "run",
        {module: update},
        embeddings=frozenset({module}),
        tied=frozenset({module} if tied else ()),
    )
    merge(run, tmp_path / "out", base=base)
    found, config = load_file(tmp_path / "out" / WEIGHTS), config_of(tmp_path / "out")
    assert_close(found[EMBED], truth(embed, update))
    if tied:
        assert HEAD not in found
        assert config["tie_word_embeddings"] is True
    else:
        assert torch.equal(found[HEAD], embed)
        assert config["tie_word_embeddings"] is False


def test_an_update_of_gpt2s_embedding_unties_its_head(tmp_path: Path) -> None:
    embed, module = torch.randn(6, 4), "transformer.wte"
    base = make_base(
        tmp_path / "base",
        {f"{module}.weight": embed},
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
    )
    update = low_rank(6, 4)
    run = make_run(tmp_path / "run", {module: update}, embeddings=frozenset({module}))
    merge(run, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert_close(found[f"{module}.weight"], truth(embed, update))
    assert torch.equal(found[HEAD], embed)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_rounding_is_measured_in_every_eighth_block(tmp_path: Path) -> None:
    """A block is 64 rows of 8192: of ten the first and the ninth are measured."""
    weight, rows = torch.ones(577, 8192), torch.zeros(577, 1)
    rows[512:576] = 1
    base = make_base(tmp_path / "base", {f"{Q}.weight": weight})
    update = RankOneSum(torch.ones(1, 8192), torch.ones(1), rows)
    merge(make_run(tmp_path / "run", {Q: update}), tmp_path / "out", base=base)
    said = certificate(tmp_path / "out")["modules"][Q]
    assert said["relative_update"] == pytest.approx(0.5**0.5, rel=1e-6)


def test_a_stored_head_that_is_another_stays(tmp_path: Path) -> None:
    embed, head, module = torch.randn(6, 4), torch.randn(6, 4), "model.embed_tokens"
    base = make_base(tmp_path / "base", {EMBED: embed, HEAD: head}, tie_word_embeddings=True)
    run = make_run(
        tmp_path / "run",
        {module: low_rank(6, 4)},
        embeddings=frozenset({module}),
        tied=frozenset({module}),
    )
    merge(run, tmp_path / "out", base=base)
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[HEAD], head)


def test_an_encoder_decoder_says_how_its_output_is_scaled(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    for tied, number in ((None, 0), (True, 1), (False, 2)):
        more = {} if tied is None else {"tie_word_embeddings": tied}
        base = make_base(
            tmp_path / f"base{number}",
            {"shared.weight": shared},
            model_type="t5",
            architectures=["T5ForConditionalGeneration"],
            **more,
        )
        update = low_rank(6, 4)
        merge(make_run(tmp_path / "run", {"lm_head": update}), tmp_path / f"o{number}", base=base)
        config = config_of(tmp_path / f"o{number}")
        assert config["scale_decoder_outputs"] is (tied is not False)
        assert config["tie_word_embeddings"] is False
        assert_close(load_file(tmp_path / f"o{number}" / WEIGHTS)[HEAD], truth(shared, update))


def test_labels_of_a_classifier(tmp_path: Path) -> None:
    tensors = {
        "roberta.encoder.layer.0.query.weight": torch.randn(4, 4),
        "classifier.out_proj.weight": torch.randn(3, 4),
    }
    roberta = {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "num_labels": 3,
    }
    module = "roberta.encoder.layer.0.query"
    for number, (labels, said) in enumerate(
        [
            (None, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}),
            ({"0": "no", "1": "yes"}, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}),
            ({"0": "a", "1": "b", "2": "c"}, {"0": "a", "1": "b", "2": "c"}),
        ]
    ):
        more = {} if labels is None else {"id2label": labels}
        base = make_base(tmp_path / f"base{number}", tensors, **roberta, **more)
        run = make_run(
            tmp_path / "run",
            {module: low_rank(4, 4)},
            task="sequence-classification",
            num_labels=3,
        )
        merge(run, tmp_path / f"out{number}", base=base)
        config = config_of(tmp_path / f"out{number}")
        assert config["id2label"] == said
        if said != labels:
            assert config["label2id"] == {f"LABEL_{i}": i for i in range(3)}
            assert "num_labels" not in config
        else:
            assert config["num_labels"] == 3
        assert config["architectures"] == ["RobertaForSequenceClassification"]


def test_frozen_weights_of_a_checkpoint_must_be_the_bases(tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": torch.randn(4, 4), f"{K}.weight": torch.randn(4, 4)}
    base = make_base(tmp_path / "base", tensors)
    own = {f"{K}.weight": tensors[f"{K}.weight"], f"{Q}.weight": tensors[f"{Q}.weight"]}
    updates = {Q: low_rank(4, 4)}
    fine = make_run(tmp_path / "run", updates, embedded_base=lazy(tmp_path / "run", own))
    merge(fine, tmp_path / "out", base=base)
    for number, other in enumerate((own[f"{K}.weight"] + 1, torch.ones(4, 5))):
        folder = tmp_path / f"run{number}"
        frozen = lazy(folder, {**own, f"{K}.weight": other})
        with pytest.raises(BaseError) as caught:
            merge(make_run(folder, updates, embedded_base=frozen), tmp_path / "no", base=base)
        assert caught.value.tensor == f"{K}.weight"


# --- companions


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    along = "tokenizer.json merges.txt spiece.model x.jinja y.tiktoken z.spm a.vocab b.bpe".split()
    along += ["LICENSE", "license.md", "Notice"]
    behind = [
        "code.py",
        "README.md",
        "pytorch_model.bin",
        "other.index.json",
        "adapter_config.json",
    ]
    for name in [*along, *behind]:
        (base / name).write_text(name)
    (base / "generation_config.json").write_text('{"top_k": 3}')
    (base / "folder.json").mkdir()
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    (run.path / "tokenizer.json").write_text("half a tokenizer")
    merge(run, tmp_path / "out", base=base)
    found = {path.name: path for path in (tmp_path / "out").iterdir()}
    beside = {"config.json", WEIGHTS, "dora_export.json", "generation_config.json"}
    assert set(found) == {*along, *beside}
    assert json.loads(found["generation_config.json"].read_text()) == {"top_k": 3}
    assert {found[name].read_text() == name for name in along} == {True}


def test_a_tokenizer_of_the_run_replaces_the_bases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text('{"of": "base"}')
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "x.json"):
        (run.path / name).write_text('{"of": "run"}')
    merge(run, tmp_path / "out", base=base)
    said = {
        path.name: path.read_text()
        for path in (tmp_path / "out").iterdir()
        if path.name not in (WEIGHTS, "config.json", "dora_export.json")
    }
    assert said == {
        "tokenizer_config.json": '{"of": "run"}',
        "tokenizer.json": '{"of": "run"}',
        "chat_template.jinja": '{"of": "run"}',
        "generation_config.json": '{"of": "base"}',
    }


def test_every_file_of_a_tokenizer_comes_from_the_run(tmp_path: Path) -> None:
    """By the names that transformers' tokenizers give them."""
    names = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    names += "chat_template.jinja chat_template.json vocab.json merges.txt vocab.txt "
    names += "tokenizer.model spiece.model sentencepiece.bpe.model spm.model source.spm "
    names += "target.spm bpe.codes"
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    for name in names.split():
        (run.path / name).write_text(json.dumps(name if "config" not in name else {"of": name}))
        (base / name).write_text("{}")
    merge(run, tmp_path / "out", base=base)
    for name in names.split():
        assert name in (tmp_path / "out" / name).read_text(), name


def test_a_full_output_is_replaced_only_by_force(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OutputError, match="not empty"):
        merge(run, tmp_path / "out", base=base)
    with pytest.raises(OutputError, match="found: old"):
        merge(run, tmp_path / "out", base=base, force=True)
    (tmp_path / "out" / "old").unlink()
    merge(run, tmp_path / "out", base=base)
    merge(run, tmp_path / "out", base=base, force=True)
    for place in (base, run.path):
        with pytest.raises(OutputError, match="inside an input"):
            merge(run, place / "out", base=base)


def test_links_out_of_the_base_are_not_followed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": torch.ones(2, 2)})
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    (tmp_path / "secret").write_text("secret")
    (base / "inside.txt").write_text("fine")
    (base / "link.txt").symlink_to(base / "inside.txt")
    merge(run, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "link.txt").read_text() == "fine"
    (base / "out.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(BaseError, match="link out") as caught:
        merge(run, tmp_path / "out2", base=base)
    assert (caught.value.file, caught.value.found) == (base / "out.txt", tmp_path / "secret")


def test_links_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--x"
    base = make_base(model / "snapshots" / "abc", {f"{Q}.weight": torch.ones(2, 2)})
    (model / "blobs").mkdir()
    (model / "blobs" / "1234").write_text("blob")
    (base / "x.txt").symlink_to(model / "blobs" / "1234")
    run = make_run(tmp_path / "run", {Q: low_rank(2, 2)})
    merge(run, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "x.txt").read_text() == "blob"
    (model / "elsewhere").write_text("secret")
    (base / "y.txt").symlink_to(model / "elsewhere")
    with pytest.raises(BaseError, match="link out"):
        merge(run, tmp_path / "out2", base=base)


# --- the journal


class Stop(SystemExit):
    """Ends a merge as a signal would."""


def interrupted(run: Run, base: Path, target: Path, after: int, **more: Any) -> Path:
    """The folder of a merge that was stopped when `after` bytes were written."""
    lock, written = threading.Lock(), 0

    @contextmanager
    def progress(_total: int) -> Iterator[Any]:
        def advance(count: int) -> None:
            nonlocal written
            with lock:
                written += count
                if written > after:
                    raise Stop(1)

        yield advance

    with pytest.raises(Stop):
        merge(run, target, base=base, resume=True, progress=progress, **more)
    (folder,) = (path for path in target.parent.iterdir() if path.name.startswith(".out."))
    return folder


def twelve(tmp_path: Path) -> tuple[Path, dict[str, Update]]:
    shards = [{f"model.layers.{n}.q_proj.weight": torch.randn(4, 6)} for n in range(12)]
    updates: dict[str, Update] = {
        f"model.layers.{n}.q_proj": low_rank(4, 6, seed=n) for n in range(12)
    }
    return make_base(tmp_path / "base", *shards), updates


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a shard was written anew."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (each.st_ino, each.st_mtime_ns) for name, each in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_merge_goes_on(tmp_path: Path) -> None:
    base, updates = twelve(tmp_path)
    run = make_run(tmp_path / "run", updates)
    merge(run, tmp_path / "whole", base=base)
    folder = interrupted(run, base, tmp_path / "out", after=6 * 96)
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    done = [line["shard"] for line in lines[1:]]
    assert 1 <= len(done) <= 6
    (folder / "stray").mkdir()
    (folder / "stray2").write_text("x")
    before = states(folder)
    told: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Any]:
        yield told.append
        assert sum(told) == total

    result = merge(run, tmp_path / "out", base=base, resume=True, progress=progress)
    after = states(tmp_path / "out")
    assert {name for name in before if before[name] == after[name]} >= set(done)
    assert told[0] == 96 * len(done)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert result.warnings == ()


@pytest.mark.parametrize("damage", ["byte", "size", "gone", "link", "report", "line", "no object"])
def test_what_the_journal_cannot_confirm_is_made_anew(tmp_path: Path, damage: str) -> None:
    base, updates = twelve(tmp_path)
    run = make_run(tmp_path / "run", updates)
    merge(run, tmp_path / "whole", base=base)
    folder = interrupted(run, base, tmp_path / "out", after=6 * 96)
    lines = (folder / JOURNAL).read_text().splitlines()
    entry = json.loads(lines[1])
    shard = folder / entry["shard"]
    raw = shard.read_bytes()
    if damage == "byte":
        shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "size":
        shard.write_bytes(raw + b"x")
    elif damage == "gone":
        shard.unlink()
    elif damage == "link":
        shard.rename(tmp_path / "moved")
        shard.symlink_to(tmp_path / "moved")
    elif damage == "report":
        lines[1] = json.dumps({**entry, "rounding": {"x": {"nonsense": 1}}})
    elif damage == "line":
        lines[1] = lines[1][:-5]
    else:
        lines[1] = "[]"
    (folder / JOURNAL).write_text("\n".join(lines) + "\n")
    before = states(folder)
    result = merge(run, tmp_path / "out", base=base, resume=True)
    after = states(tmp_path / "out")
    kept = {name for name in before if before[name] == after[name]}
    others = {json.loads(line)["shard"] for line in lines[2:]}
    if damage in ("line", "no object"):
        assert not kept & others
    else:
        assert kept & others == others
    told = any(entry["shard"] in warning for warning in result.warnings)
    assert told is (damage not in ("line", "no object"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["low rank", "dense", "magnitude"])
@pytest.mark.parametrize("what", ["update", "base", "dtype", "method", "file"])
def test_of_another_merge_nothing_is_taken(tmp_path: Path, kind: str, what: str) -> None:
    base, updates = twelve(tmp_path)
    last = "model.layers.11.q_proj"
    file = tmp_path / "run" / "file"
    file.parent.mkdir()
    file.write_text("1")

    def last_update(size: float) -> Update:
        delta = low_rank(4, 6, seed=5, size=size)
        if kind == "low rank":
            return delta
        if kind == "magnitude":
            return MagnitudeUpdate(torch.full((4,), size), low_rank(4, 6))
        return Dense(delta.dense())

    run = make_run(tmp_path / "run", {**updates, last: last_update(1.0)}, files=(file,))
    folder = interrupted(run, base, tmp_path / "out", after=6 * 96)
    before = states(folder)
    more: dict[str, Any] = {}
    if what == "update":
        run = make_run(run.path, {**updates, last: last_update(2.0)}, files=(file,))
    elif what == "base":
        path = max(base.glob("*.safetensors"))
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif what == "dtype":
        more["dtype"] = torch.bfloat16
    elif what == "method":
        run = Run(run.path, "other", run.updates, files=(file,))
    else:
        file.write_text("2")
    result = merge(run, tmp_path / "out", base=base, resume=True, **more)
    assert not before.items() & states(tmp_path / "out").items()
    assert any("another run" in warning for warning in result.warnings)
    merge(run, tmp_path / "whole", base=base, **more)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
