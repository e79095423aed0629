"""Bayesian-LoRA and BayesLoRA: artifacts equal the live logits of the methods' own code.

The runs lie in `data/methods/bayesian_lora` and `data/methods/bayeslora`; their bases are those of
`data/reference`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from converters.run import Run
from dora_serve import DoraExportError, merge, read_run
from tests.conftest import DATA
from tests.converters.proving import expected, prove

BASES = DATA / "reference" / "bases"
BLORA, BAYESLORA = DATA / "methods" / "bayesian_lora", DATA / "methods" / "bayeslora"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "roberta.encoder.layer.0.attention.self.query"
TOLD = ReadOptions(lora_alpha=12, start_rank=6)

Tensors = dict[str, torch.Tensor]


def compare(run: Run, folder: Path, family: str, out: Path) -> None:
    # vLLM adapts no RoBERTa and no DeBERTa.
    targets = ("peft", "vllm") if family == "llama" else ("peft",)
    prove(run, BASES / family, *expected(folder), out, targets)


@pytest.mark.supports(method="bayesian_lora", family="roberta", targets=("merged", "peft"))
@pytest.mark.parametrize("name", ["scale", "range", "unsaved-range"])
def test_bayesian_lora_equals_the_forks_live_model(tmp_path: Path, name: str) -> None:
    run = read_run(BLORA / name)
    assert run.method == "bayesian_lora"
    said = [each for each in run.warnings if "expected.safetensors" not in each]  # the test's own
    assert len(said) == 1 and "activations" in said[0] and "differs" not in said[0]
    compare(run, BLORA / name, "roberta", tmp_path)


@pytest.mark.parametrize("name", ["scale", "range"])
def test_quantized_factors_are_the_forks_bit_for_bit(name: str) -> None:
    run, forks = read_run(BLORA / name), load_file(BLORA / name / "expected.safetensors")
    stored = load_file(BLORA / name / WEIGHTS)
    quantized = 0
    for module in run.updates:
        update = run.updates[module].components()
        assert update is not None
        assert torch.equal(update.a, forks[f"{module}.A"])
        assert torch.equal(update.b, forks[f"{module}.B"])
        e = forks.get(f"{module}.E", torch.ones(4, 1))
        assert torch.equal(update.c, e.flatten() * 8 / 4)
        raw = stored[f"base_model.model.{module}.lora_B"]
        quantized += float((raw - update.b).abs().max()) > 1e-5
    assert quantized  # or the comparison says nothing about levels


def test_ranks_are_those_of_the_hard_gates() -> None:
    run = read_run(BLORA / "unsaved-range")
    ranks = [run.strip().rank(module) for module in run.updates]
    assert ranks == [2, 1, 3, 2]  # the value of layer 0 keeps component 0 alone
    assert set(run.start_rank.values()) == {4}


@pytest.mark.supports(method="bayeslora", family="roberta", targets=("merged", "peft"))
def test_bayeslora_checkpoint_of_the_whole_model(tmp_path: Path) -> None:
    run = read_run(BAYESLORA / "roberta", TOLD)
    assert run.method == "bayeslora"
    assert [run.rank(module) for module in run.updates] == [0, 5, 0, 5]
    assert run.embedded_base is not None and f"{QUERY}.weight" in run.embedded_base
    compare(run, BAYESLORA / "roberta", "roberta", tmp_path)


@pytest.mark.supports(method="bayeslora", family="llama", targets=("merged", "peft", "vllm"))
def test_bayeslora_checkpoint_of_what_was_trained(tmp_path: Path) -> None:
    run = read_run(BAYESLORA / "llama", TOLD)
    assert not run.replaced
    assert set(run.start_rank.values()) == {6}
    compare(run, BAYESLORA / "llama", "llama", tmp_path)


def test_bayeslora_on_another_base_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASES / "roberta", base)
    tensors = load_file(base / "model.safetensors")
    tensors[f"{QUERY}.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(DoraExportError, match="not the base"):
        merge(read_run(BAYESLORA / "roberta", TOLD), tmp_path / "out", base=base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReadOptions(start_rank=6), "`lora_alpha`"),
        (ReadOptions(lora_alpha=12), "`start_rank`"),
        (ReadOptions(lora_alpha=12, start_rank=4), "initial rank"),
    ],
)
def test_bayeslora_needs_what_the_file_leaves_out(options: ReadOptions, message: str) -> None:
    with pytest.raises(DoraExportError, match=message):
        read_run(BAYESLORA / "llama", options)


def damaged(source: Path, out: Path, weights: str, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / weights)
    change(tensors)
    save_file(tensors, out / weights, {"format": "pt"})
    return out


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_bayeslora_with_a_factor_that_does_not_fit(tmp_path: Path, damage: str) -> None:
    def change(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.up_proj.B_mu"
        tensor = tensors.pop(name)
        if damage == "shape":
            tensors[name] = tensor[:, 1:].contiguous()

    folder = damaged(BAYESLORA / "llama", tmp_path / "run", "model.safetensors", change)
    with pytest.raises(DoraExportError, match=r"do not fit each other[^$]*up_proj"):
        read_run(folder, TOLD)


def state(quantizer: str, part: str) -> str:
    return f"base_model.model.{QUERY}.lora_{quantizer}_quantizer.quantizer.{part}"


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, *values: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.tensor(values, dtype=torch.float32)})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scale", drop(f"base_model.model.{QUERY}.lora_A"), "incomplete"),
        ("scale", drop(f"base_model.model.{QUERY}.lora_B"), "incomplete"),
        ("scale", drop(state("E", "gamma_2")), "gate of the adapter is missing"),
        ("scale", drop(state("B", "gamma_16")), r"missing[^$]*lora_B_quantizer.*gamma_16"),
        ("scale", put(state("E", "gamma_2"), 1, 1), "does not fit"),
        ("scale", drop(state("B", "s_2")), "range of a quantized factor is not known"),
        ("scale", put(state("A", "s_2"), 0), "range of a quantized factor is not known"),
        ("scale", put(state("A", "gamma_4"), float("nan")), "NaN"),
        ("scale", put(f"base_model.model.{QUERY}.weight_quantizer.gamma_4", 2), "does not read"),
        ("unsaved-range", put(state("A", "gamma_32"), -5), "16 bits without a step"),
    ],
)
def test_bad_bayesian_lora(
    tmp_path: Path, name: str, change: Callable[[Tensors], None], message: str
) -> None:
    folder = damaged(BLORA / name, tmp_path / "run", WEIGHTS, change)
    with pytest.raises(DoraExportError, match=message):
        merge(read_run(folder), tmp_path / "out", base=BASES / "roberta")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"), [({"lora_alpha": None}, "`lora_alpha`"), ({"r": 8}, "stored rank")]
)
def test_bad_bayesian_lora_configuration(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(BLORA / "range", folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(DoraExportError, match=message):
        read_run(folder)


def test_quantized_activations_are_told(tmp_path: Path) -> None:
    change = put(state("A_act", "gamma_8"), -5)
    run = read_run(damaged(BLORA / "scale", tmp_path / "run", WEIGHTS, change))
    assert "live model differs, as 1 of 4 modules" in run.warnings[0]
    assert run.warnings[0] in merge(run, tmp_path / "out", base=BASES / "roberta").warnings
