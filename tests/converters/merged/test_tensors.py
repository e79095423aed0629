"""Merged tensors against float64, block by block, and the files that they lie in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.errors import BaseError
from converters.model.base import open_base
from converters.targets.merged.plan import plan_merge
from converters.updates.magnitude import MagnitudeUpdate
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update
from dora_serve import merge
from tests.conftest import Dense
from tests.converters.made import (
    WEIGHTS,
    K,
    Q,
    assert_close,
    certificate,
    low_rank,
    make_base,
    make_run,
    moved,
)


def rounded(weight: torch.Tensor, update: RankOneSum, dtype: torch.dtype) -> torch.Tensor:
    """The float32 merge, rounded once."""
    return (weight.float().addmm(update.b * update.c, update.a)).to(dtype)


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
        assert_close(merged, moved(tensors[f"{Q}.weight"], update))
    else:
        off = merged != rounded(tensors[f"{Q}.weight"], update.strip().reduced().sorted(), out)
        assert int(off.sum()) <= merged.numel() // 1000  # sums in another order round differently
        assert_rounds(merged, moved(tensors[f"{Q}.weight"], update))
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
    expected = moved(weight, delta, transposed=True)
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
        said = {"model_type": kind, "architectures": []}
        base = make_base(tmp_path / f"base{number}", {f"{name}.weight": weight}, **said)
        run = make_run(tmp_path / "run", {name: update})
        merge(run, tmp_path / f"out{number}", base=base)
        found = load_file(tmp_path / f"out{number}" / WEIGHTS)[f"{name}.weight"]
        assert_close(found, moved(weight, update))


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
                assert_close(found[name], moved(tensor, updates[module]))
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


def test_what_a_plan_says(tmp_path: Path) -> None:
    shards = (
        {f"{Q}.weight": torch.randn(4, 4), "x": torch.ones(2)},
        {f"{K}.weight": torch.randn(4, 4), "y": torch.ones(3).half(), "n": torch.arange(2)},
    )
    base = make_base(tmp_path / "base", *shards)
    updates: dict[str, Update] = {Q: low_rank(4, 4), K: Dense(torch.randn(4, 4))}
    run = make_run(tmp_path / "run", updates, start_rank={Q: 8, K: 3, "gone": 5})
    said = {
        "method": "test",
        "finished": True,
        "shards": {f"model-0000{n}-of-00002.safetensors": n + 1 for n in (1, 2)},
        "merged": [f"{Q}.weight", f"{K}.weight"],
        "copied": 3,
        "modules": 2,
        "components": {"start": 16, "kept": 5},  # what is no sum is there whole
    }
    plan = plan_merge(run, open_base(base), None)
    assert plan.summary() == said
    assert plan.lines() == [
        "merged 2 modules (5 of 16 components survived training) into 5 tensors in 2 shard(s)"
    ]
    assert plan.nbytes == 64 + 8 + 64 + 6 + 16
    narrow = plan_merge(run, open_base(base), torch.float16)
    assert narrow.summary()["copied"] == 2
    assert narrow.nbytes == 32 + 4 + 32 + 6 + 16
