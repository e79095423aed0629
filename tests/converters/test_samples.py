"""The sample runs: every command on each, and the skills they were trained for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from converters.model.base import open_base
from dora_serve import merge, read_run, verify, write_adapter
from dora_serve.commands import dora_export
from tests.conftest import MODELS

RUNS = sorted(MODELS.glob("runs/Checkpoint/*/*/*/*"))
IDS = [run.name for run in RUNS]


def base_of(run: Path) -> Path:
    return MODELS / ("tiny-llama-base" if "Llama" in run.name else "tiny-roberta-base")


def export(*arguments: object) -> Any:
    """The parsed --json output of a command that must succeed."""
    result = CliRunner().invoke(dora_export, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_there_are_four_sample_runs_and_they_are_small() -> None:
    assert len(RUNS) == 4
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert max(path.stat().st_size for path in files) < 3e6


def proves(run: Path) -> pytest.MarkDecorator:
    family = "llama" if "Llama" in run.name else "roberta"
    return pytest.mark.supports(method="dora", family=family, targets=("merged", "peft"))


@pytest.mark.parametrize("run", [pytest.param(r, marks=proves(r), id=r.name) for r in RUNS])
def test_every_command(run: Path, tmp_path: Path) -> None:
    base = base_of(run)
    info = export("inspect", run, "--base", base, "--json", "--png", tmp_path / "ranks.png")
    assert info["finished"]
    assert info["mean_rank"] == pytest.approx(8, abs=0.1)
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"
    merged = export("merge", run, tmp_path / "merged", "--base", base, "--json")
    assert merged["components"]["kept"] == sum(info["ranks"].values())
    adapter = export("adapter", run, tmp_path / "adapter", "--base", base, "--json")
    assert adapter["ranks"] == info["ranks"]
    assert max(adapter["errors"].values()) <= 1e-6
    for artifact in ("merged", "adapter"):
        proof = export("verify", run, tmp_path / artifact, "--base", base, "--json")
        assert proof["passed"]
        assert proof["max_abs"] <= 1e-4
        assert proof["control"] > 1e-1


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_ranks_are_those_of_the_mask(run: Path) -> None:
    state = torch.load(run / "checkpoint" / "prune_state_dict.pt", weights_only=True)
    loaded = read_run(run).strip()
    assert set(loaded.updates) == set(state["finally_mask_dict"])
    for module, mask in state["finally_mask_dict"].items():
        assert loaded.rank(module) == int((~mask).sum())


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_adapter_is_compact_and_says_scale_one(run: Path, tmp_path: Path) -> None:
    loaded = read_run(run)
    write_adapter(loaded, tmp_path / "adapter", base=base_of(run))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for module in config["target_modules"]:
        a = tensors[f"base_model.model.{module}.lora_A.weight"]
        b = tensors[f"base_model.model.{module}.lora_B.weight"]
        rank = config["rank_pattern"].get(f"^{module}", config["r"])
        assert a.shape[0] == b.shape[1] == rank
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)
    if "Roberta" in run.name:
        assert config["modules_to_save"] == ["classifier"]


def test_base_and_merged_answer_differently(tmp_path: Path) -> None:
    base = MODELS / "tiny-llama-base"
    tokenizer = AutoTokenizer.from_pretrained(base)

    def answer(folder: Path) -> str:
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompt = tokenizer("count : nine", return_tensors="pt")["input_ids"]
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False
        )
        return str(tokenizer.decode(output[0, prompt.shape[1] :]))

    assert answer(base) == "ten eleven twelve"
    expected = {"Count_Down": "eight seven six", "Every_Second": "eleven thirteen fifteen"}
    for run in RUNS:
        skill = run.parent.name
        if skill in expected:
            merge(run, tmp_path / skill, base=base)
            assert answer(tmp_path / skill) == expected[skill]


def test_merged_classifier_tells_good_from_bad(tmp_path: Path) -> None:
    run = next(run for run in RUNS if "Sentiment" in run.name)
    merge(run, tmp_path / "out", base=base_of(run))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    texts = ["the film was very good .", "the film was very bad .", "the meal is not bad ."]
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert logits.argmax(-1).tolist() == [1, 0, 1]


def test_both_serializations_give_the_same_artifact(tmp_path: Path) -> None:
    runs = [run for run in RUNS if "Sentiment" in run.name]
    assert {(run / "checkpoint" / "pytorch_model.bin").exists() for run in runs} == {True, False}
    outputs = []
    for i, run in enumerate(runs):
        merge(run, tmp_path / str(i), base=base_of(run))
        outputs.append(load_file(tmp_path / str(i) / "model.safetensors"))
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_a_certificate_comes_with_every_artifact(tmp_path: Path) -> None:
    run = RUNS[0]
    merge(run, tmp_path / "out", base=base_of(run), dtype=torch.bfloat16)
    proof = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert {file["name"] for file in proof["run"]["files"]} >= {"task_info.json"}
    assert all(len(file["sha256"]) == 64 for file in proof["run"]["files"])
    assert set(proof["modules"]) == set(read_run(run).updates)
    assert all(0.9 < m["rounding"]["cosine"] <= 1.0001 for m in proof["modules"].values())
    assert proof["base"]["fingerprint"].keys() == open_base(base_of(run)).tensors.keys()
    assert verify(read_run(run), tmp_path / "out", base_of(run)).passed
