"""`diff`: runs, adapters and models, against the dense matrices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters.compare import compare
from converters.model.base import open_base
from converters.run import Run
from converters.updates.rank_one import RankOneSum
from dora_serve import DoraExportError, diff, merge, read_run, write_adapter
from dora_serve.commands import dora_export
from tests.conftest import MODELS, Dense
from tests.converters.families import DECODER, save_adapter, save_base
from tests.converters.made import WEIGHTS

RUNS = {run.parent.name: run for run in MODELS.glob("runs/Checkpoint/Tiny_Llama/*/*/*")}
COUNT, SECOND = RUNS["Count_Down"], RUNS["Every_Second"]
BASE = MODELS / "tiny-llama-base"


def export(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(dora_export, [str(argument) for argument in (*arguments, "--json")])
    assert result.exit_code == 0, result.output
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_a_run_and_what_was_made_of_it_are_the_same(tmp_path: Path) -> None:
    write_adapter(COUNT, tmp_path / "adapter", base=BASE)
    merge(COUNT, tmp_path / "merged", base=BASE)
    for artifact in ("adapter", "merged"):
        found = diff(COUNT, tmp_path / artifact, base=BASE)
        assert len(found.modules) == 28
        for module in found.modules.values():
            assert module.relative is not None
            assert module.relative < 1e-6
            assert module.cosine == pytest.approx(1)
        assert found.whole == {}


def test_ids_of_the_hub_are_taken_from_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model too, and by `lint`: what was looked for was a run alone, or a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("merged", "adapter"):
        (tmp_path / f"models--a--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--a--{name}" / "refs" / "main").write_text("c0ffee")
    merge(COUNT, tmp_path / "models--a--merged" / "snapshots" / "c0ffee", base=BASE)
    write_adapter(COUNT, tmp_path / "models--a--adapter" / "snapshots" / "c0ffee", base=BASE)
    assert export("diff", "a/adapter", "a/merged", "--base", BASE)["total"]["relative"] < 1e-6
    assert export("lint", "a/adapter", "--target", "peft")["adapter"] == "a/adapter"
    said = CliRunner().invoke(dora_export, ["lint", "a/gone"])
    assert said.exit_code == 1 and "neither a folder nor in the local hub cache" in said.output


def test_another_run_is_far_away(tmp_path: Path) -> None:
    total = export("diff", COUNT, SECOND)["total"]
    assert total["relative"] > 1
    assert abs(total["cosine"]) < 0.1
    merge(SECOND, tmp_path / "merged", base=BASE)
    dense = export("diff", COUNT, tmp_path / "merged", "--base", BASE)["total"]
    assert dense == pytest.approx(total, rel=1e-5)


def test_numbers_are_those_of_the_matrices() -> None:
    generator = torch.Generator().manual_seed(0)

    def update(rank: int) -> RankOneSum:
        a, b = torch.randn(rank, 7, generator=generator), torch.randn(9, rank, generator=generator)
        return RankOneSum(a, torch.randn(rank, generator=generator), b)

    one, two, three = update(3), update(2), update(4)
    left = Run(Path("left"), "test", {"both": one, "left": three, "none": update(0)})
    right = Run(Path("right"), "test", {"both": two, "right": three, "none": update(0)})
    found = compare(left, right, None, None)
    a, b, c = (u.dense().double() for u in (one, two, three))
    both = found.modules["both.weight"]
    assert both.relative == pytest.approx(float((a - b).norm() / a.norm()))
    assert both.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    alone = [found.modules[f"{side}.weight"] for side in ("left", "right", "none")]
    assert [m.relative for m in alone] == [pytest.approx(1), None, 0]
    assert [m.cosine for m in alone] == [None, None, None]
    apart = float((a - b).square().sum() + 2 * c.square().sum())
    whole = float(a.square().sum() + c.square().sum())
    assert found.total.relative == pytest.approx((apart / whole) ** 0.5)


def test_updates_without_components_are_compared_through_the_base(llama_base: Path) -> None:
    base = open_base(llama_base)
    module = "model.layers.0.self_attn.q_proj"
    one, two = torch.randn(32, 32), torch.randn(32, 32)
    left = Run(Path("left"), "test", {module: Dense(one)})
    right = Run(Path("right"), "test", {module: Dense(two)})
    found = compare(left, right, base, base).modules[f"{module}.weight"]
    assert found.relative == pytest.approx(float((one - two).norm() / one.norm()), rel=1e-5)
    with pytest.raises(DoraExportError, match="`base`"):
        compare(left, right, None, None)


def test_tensors_trained_whole_are_told(tmp_path: Path) -> None:
    # The same run in two serializations.
    runs = sorted(MODELS.glob("runs/Checkpoint/Tiny_Roberta/*/*/*"))
    base = MODELS / "tiny-roberta-base"
    same = diff(*runs, base=base)
    assert same.total.relative == pytest.approx(0)
    assert set(same.whole.values()) == {0.0}
    assert {name.split(".")[0] for name in same.whole} == {"classifier"}
    merge(runs[0], tmp_path / "merged", base=base)
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.dense.weight"] *= 1.5
    del tensors["classifier.dense.bias"]
    save_file(tensors, file)
    other = diff(runs[0], tmp_path / "merged", base=base).whole
    assert other["classifier.dense.weight"] == pytest.approx(0.5)
    assert other["classifier.dense.bias"] is None
    assert other["classifier.out_proj.weight"] == 0


def test_the_table_names_every_module() -> None:
    result = CliRunner().invoke(dora_export, ["diff", str(COUNT), str(SECOND)])
    assert result.exit_code == 0, result.output
    assert all(module in result.stdout for module in read_run(COUNT).updates)


def test_a_model_needs_its_base_and_models_of_other_shape_are_refused(
    llama_lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    with pytest.raises(DoraExportError, match="`base`"):
        diff(COUNT, tmp_path / "model")
    with pytest.raises(DoraExportError, match="two shapes"):
        diff(COUNT, llama_lora)
    with pytest.raises(DoraExportError, match="no such run"):
        diff(COUNT, tmp_path / "nothing")


def test_a_module_trained_whole_is_the_change_that_a_merged_model_has(tmp_path: Path) -> None:
    """One side holds the matrix, the other what it adds to the base's."""
    base = tmp_path / "base"
    cls = save_base("gpt2", base)
    lora = {"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}
    save_adapter(cls, base, tmp_path / "lora", **lora)
    merge(tmp_path / "lora", tmp_path / "merged", base=base)
    name = "transformer.h.0.mlp.c_fc.weight"
    change = load_file(tmp_path / "merged" / WEIGHTS)[name].double()
    change -= load_file(base / WEIGHTS)[name].double()
    for a, b in (("lora", "merged"), ("merged", "lora")):
        found = diff(tmp_path / a, tmp_path / b, base=base)
        assert len(found.modules) == 4
        assert found.total.relative is not None
        assert found.total.relative < 1e-6
        assert found.modules[name].left == pytest.approx(float(change.square().sum()))
        assert found.whole == {f"transformer.h.{n}.mlp.c_fc.bias": 0.0 for n in (0, 1)}
    save_adapter(cls, base, tmp_path / "other", target_modules=["c_fc"])
    against = diff(tmp_path / "lora", tmp_path / "other", base=base)
    assert name in against.modules
    assert name not in against.whole
    with pytest.raises(DoraExportError, match="holds whole what the other has"):
        diff(tmp_path / "lora", tmp_path / "other")


def test_blocks_are_not_compared_with_a_whole(tmp_path: Path) -> None:
    base, values = tmp_path / "base", {**DECODER, "num_local_experts": 2}
    transformers.GptOssForCausalLM(transformers.GptOssConfig(**values)).save_pretrained(base)
    cls = transformers.GptOssForCausalLM
    experts = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    save_adapter(cls, base, tmp_path / "lora", **experts)
    merge(tmp_path / "lora", tmp_path / "merged", base=base)
    for a, b in (("lora", "merged"), ("merged", "lora")):
        with pytest.raises(DoraExportError, match="holds whole what the other has"):
            diff(tmp_path / a, tmp_path / b, base=base)
