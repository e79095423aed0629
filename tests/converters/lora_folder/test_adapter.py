"""Adapters of made-up runs, loaded by PEFT and compared with float64; and all that they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.errors import OutputError, TargetError
from converters.fit import percent
from converters.run import Run
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update
from dora_serve import write_adapter
from tests.conftest import Dense
from tests.converters.lora_folder.llama import (
    DOWN1,
    EMBED,
    HEAD,
    K0,
    Q0,
    Q1,
    UP0,
    V0,
    assert_deployed,
    deployed,
    errors,
    make_run,
    ranks_in,
    stored,
)
from tests.converters.made import certificate, delta_of, lazy


@pytest.mark.parametrize(
    "ranks",
    [
        {Q0: 3, K0: 1, UP0: 4, DOWN1: 2, Q1: 4},
        {Q0: 2},
        {Q0: 2, V0: 0, Q1: 5},
        {EMBED: 3, HEAD: 2, Q0: 3},
    ],
    ids=["many", "one", "none in one", "embeddings"],
)
def test_peft_computes_the_run(tmp_path: Path, llama_base: Path, ranks: dict[str, int]) -> None:
    run = make_run(tmp_path / "run", ranks, embeddings=frozenset({EMBED} & ranks.keys()))
    result = write_adapter(run, tmp_path / "out", base=llama_base)
    assert_deployed(deployed(llama_base, tmp_path / "out"), llama_base, run)
    config, tensors = stored(tmp_path / "out")
    alive = {module: rank for module, rank in ranks.items() if rank}
    most = max(alive.values())
    patterns = {f"^{module}": rank for module, rank in alive.items() if rank != most}
    assert config == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(llama_base),
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(alive),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    assert len(tensors) == 2 * len(alive)
    assert result.plan.nbytes == sum(t.numel() * 4 for t in tensors.values())
    assert ranks_in(tmp_path / "out") == ranks
    found = errors(tmp_path / "out")
    assert max(found.values()) < 1e-6
    assert {module for module, error in found.items() if error} <= set(alive)
    assert (result.path, result.warnings) == (tmp_path / "out", ())
    summary = {"ranks": ranks, "max_rank": most, "modules_to_save": None, "whole": [], "fit": None}
    assert result.plan.summary() == summary
    assert result.plan.lines() == [
        f"LoRA adapter for peft, {len(alive)} of {len(ranks)} modules, ranks up to {most}, "
        "0 tensors whole"
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "dora_export.json")
    }


def test_without_a_base_the_runs_own_name_of_it_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 2}, base="org/model", task="causal-lm")
    write_adapter(run, tmp_path / "out")
    config, _ = stored(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/model", "CAUSAL_LM")


def test_what_goes_with_the_weights(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 3, V0: 0}, start_rank={Q0: 8, V0: 7}, warnings=("told",))
    result = write_adapter(run, tmp_path / "out", base=llama_base)
    assert result.warnings == ("told",)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and f"base_model: {llama_base}" in card
    assert f"|---:|---:|\n| `{Q0}` | 8 | 3 |\n| `{V0}` | 7 | 0 |\n" in card
    assert "- lora\n- dynamic-rank\n---\n" in card and card.endswith("| 7 | 0 |\n")
    assert "3 of 15 rank-1 components" in card and "PeftModel.from_pretrained" in card
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert (said["target"], said["dtype"], said.get("fit")) == ("peft", "float32", None)
    assert said["replaced"] == []
    assert said["modules"] == {
        Q0: {"start_rank": 8, "rank": 3, "error": pytest.approx(0, abs=1e-6)},
        V0: {"start_rank": 7, "rank": 0, "error": 0.0},
    }
    without = make_run(tmp_path / "run", {Q0: 1})
    write_adapter(without, tmp_path / "out2")
    card = (tmp_path / "out2" / "README.md").read_text()
    assert "base_model: unknown" in card and f"| `{Q0}` |  | 1 |" in card
    assert "1 of 0 rank-1" in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_round_the_balanced_factors(
    tmp_path: Path, llama_base: Path, dtype: torch.dtype
) -> None:
    run = make_run(tmp_path / "run", {Q0: 3})
    result = write_adapter(run, tmp_path / "out", base=llama_base, dtype=dtype)
    _, tensors = stored(tmp_path / "out")
    a, b = (tensors[f"base_model.model.{Q0}.lora_{side}.weight"] for side in "AB")
    assert a.dtype == b.dtype == dtype
    update = run.updates[Q0]
    assert isinstance(update, RankOneSum)
    own_a, own_b = update.strip().reduced().sorted().balanced()
    assert torch.equal(a, own_a.to(dtype)) and torch.equal(b, own_b.to(dtype))
    delta = delta_of(update)
    gap = np.linalg.norm(b.double().numpy() @ a.double().numpy() - delta) / np.linalg.norm(delta)
    assert errors(tmp_path / "out")[Q0] == pytest.approx(gap, rel=1e-4)
    assert result.plan.nbytes == 3 * 64 * 2
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["dtype"] == str(dtype).removeprefix("torch.")


def test_a_lossy_dtype_is_told(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 1, K0: 1})
    tiny = RankOneSum(torch.ones(1, 32), torch.tensor([1e-14]), torch.linspace(1, 2, 32)[:, None])
    run = Run(run.path, "test", {**run.updates, Q0: tiny})
    result = write_adapter(run, tmp_path / "out", base=llama_base, dtype=torch.float16)
    assert errors(tmp_path / "out")[Q0] > 0.05
    assert len(result.warnings) == 1
    assert "torch.float16" in result.warnings[0] and "in 1 modules" in result.warnings[0]


def test_a_run_pruned_to_nothing(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 0, K0: 0})
    write_adapter(run, tmp_path / "out", base=llama_base)
    config, tensors = stored(tmp_path / "out")
    assert (config["target_modules"], config["r"]) == ([Q0], 1)
    assert sorted(tuple(t.shape) for t in tensors.values()) == [(1, 32), (32, 1)]
    assert not any(bool(tensor.any()) for tensor in tensors.values())
    assert errors(tmp_path / "out") == {Q0: 0.0, K0: 0.0}
    assert_deployed(deployed(llama_base, tmp_path / "out"), llama_base, run)


@pytest.mark.parametrize("limit", [{"max_rank": 2}, {"energy": 0.9}, {"budget": 300}])
def test_limits_approximate(tmp_path: Path, llama_base: Path, limit: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", {Q0: 4, UP0: 4})
    result = write_adapter(run, tmp_path / "out", base=llama_base, **limit)
    fit = certificate(tmp_path / "out")["fit"]
    assert fit["limit"] == limit
    assert fit["error"] > 0.01
    assert ranks_in(tmp_path / "out") == fit["ranks"]
    assert sum(fit["ranks"].values()) < 8
    found = deployed(llama_base, tmp_path / "out")
    weights = load_file(llama_base / "model.safetensors")
    lost = total = 0.0
    for module in (Q0, UP0):
        change = delta_of(run.updates[module])
        gap = found[f"{module}.weight"] - weights[f"{module}.weight"].double().numpy()
        lost += float(np.linalg.norm(gap - change)) ** 2
        total += float(np.linalg.norm(change)) ** 2
    assert fit["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert len(result.warnings) == 1 and result.warnings[0].startswith("approximated")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Approximated**" in card and "| module | start rank | rank | error |" in card
    ((name, value),) = limit.items()
    assert f"({name.replace('_', ' ')} {value})" in card
    assert f"{sum(fit['ranks'].values())} rank-1 components" in card
    assert f"of {percent(fit['error'])} in all" in card
    for module, rank in fit["ranks"].items():
        assert f"\n| `{module}` |  | {rank} | {percent(fit['errors'][module])} |\n" in card
    assert set(fit["ranks"]) == {Q0, UP0}
    assert result.plan.summary()["fit"] == fit
    assert result.plan.lines()[1:] == result.plan.run.fit.lines()


def test_what_is_no_sum_is_refused_unless_fitted(tmp_path: Path, llama_base: Path) -> None:
    update: Update = Dense(torch.randn(32, 32))
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "test", {Q0: update})
    with pytest.raises(TargetError, match="not low-rank") as caught:
        write_adapter(run, tmp_path / "out", base=llama_base)
    assert caught.value.tensor == Q0
    write_adapter(run, tmp_path / "out", base=llama_base, max_rank=4)
    assert ranks_in(tmp_path / "out") == {Q0: 4}


def test_a_run_without_updates(tmp_path: Path, llama_base: Path) -> None:
    (tmp_path / "run").mkdir()
    whole = lazy(tmp_path / "run", {"lm_head.weight": torch.ones(80, 32)})
    with pytest.raises(TargetError, match="no matrix") as caught:
        write_adapter(
            Run(tmp_path / "run", "test", {}, replaced=whole), tmp_path / "out", base=llama_base
        )
    assert "lm_head.weight" in str(caught.value.found)


@pytest.mark.parametrize("target", ["nonsense", "PEFT", ""])
def test_unknown_targets(tmp_path: Path, target: str) -> None:
    run = make_run(tmp_path / "run", {Q0: 2})
    with pytest.raises(TargetError, match="unknown target") as caught:
        write_adapter(run, tmp_path / "out", target=target)
    assert caught.value.found == target


def test_outputs_are_checked(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 2})
    for target in (tmp_path / "run" / "out", tmp_path):
        with pytest.raises(OutputError, match="inside an input"):
            write_adapter(run, target)
    with pytest.raises(OutputError, match="inside an input"):
        write_adapter(run, llama_base / "out", base=llama_base)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OutputError, match="not empty"):
        write_adapter(run, tmp_path / "out")
    with pytest.raises(OutputError, match="found: old"):
        write_adapter(run, tmp_path / "out", force=True)
    (tmp_path / "out" / "old").unlink()
    write_adapter(run, tmp_path / "out")
    write_adapter(run, tmp_path / "out", force=True)
