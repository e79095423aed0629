"""Gated LoRA: a run of SoRA's own code, and ALoRA as published, which has no public code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, RobertaForSequenceClassification

from converters.errors import DoraExportError, RunError
from converters.readers import ReadOptions
from dora_serve import read_run, write_adapter
from dora_serve.proof.verify import verification_batch
from tests.conftest import DATA
from tests.converters.proving import Inputs, change_bin, expected, logits, prove

SORA = DATA / "methods" / "sora"
ROBERTA = DATA / "reference" / "bases" / "roberta"
RANK, ALPHA = 4, 10
OPTIONS = ReadOptions(lora_alpha=ALPHA, start_rank=RANK)


@pytest.mark.supports(method="gated (SoRA)", family="roberta", targets=("merged", "peft"))
def test_sora(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="`lora_alpha`"):
        read_run(SORA / "run")
    run = read_run(SORA / "run", ReadOptions(lora_alpha=16))
    prove(run, ROBERTA, *expected(SORA), tmp_path, ("peft",))
    assert set(run.start_rank.values()) == {4}
    assert {run.strip().rank(module) for module in run.updates} >= {0, 1, 2}
    # It trained LayerNorms, which no vLLM adapter carries.
    with pytest.raises(DoraExportError, match="LayerNorm"):
        write_adapter(run, tmp_path / "vllm", base=ROBERTA, target="vllm")


class Gated(nn.Module):
    """ALoRA, arXiv 2403.16187, equation 3 on: x·Wᵀ + s·B·diag(α)·A·x, α in {0, 1} at the end."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = torch.randn(RANK, linear.in_features) * 0.3
        self.b = torch.randn(linear.out_features, RANK) * 0.3
        self.gate = torch.tensor([1.0, 0.0, 1.0, 0.0])
        self.on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        if self.on:
            result = result + ALPHA / RANK * (self.gate * (x @ self.a.T)) @ self.b.T
        return result


def gate_layers(model: Any, names: tuple[str, ...]) -> dict[str, Gated]:
    torch.manual_seed(2)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(names):
            layers[name] = Gated(module)
            model.set_submodule(name, layers[name])
    return layers


def compare(model: Any, layers: dict[str, Gated]) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    inputs = verification_batch(model)
    truth = logits(model, inputs)
    for layer in layers.values():
        layer.on = False
    return inputs, truth, logits(model, inputs)


def write_adapter_folder(folder: Path, layers: dict[str, Gated], gate: str, **config: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": layer.a, f"{key}.lora_B.weight": layer.b}
        tensors[f"{key}.{gate}"] = layer.gate.clone()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.supports(method="gated (ALoRA)", family="llama", targets=("merged", "peft", "vllm"))
def test_alora_adapter_folder(tmp_path: Path, llama_base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    layers = gate_layers(model, ("q_proj", "down_proj"))
    write_adapter_folder(tmp_path / "run", layers, "lora_gate", r=RANK, lora_alpha=ALPHA)
    run = read_run(tmp_path / "run")
    prove(run, llama_base, *compare(model, layers), tmp_path)
    assert {run.strip().rank(module) for module in run.updates} == {2}


@pytest.mark.supports(method="gated (ALoRA)", family="roberta", targets=("merged", "peft"))
def test_alora_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = RobertaForSequenceClassification.from_pretrained(ROBERTA, num_labels=3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config.architectures = ["RobertaForSequenceClassification"]
    model.config.save_pretrained(tmp_path / "run")
    layers = gate_layers(model, ("query", "output.dense"))
    for name, layer in layers.items():
        state |= {f"{name}.lora_A": layer.a, f"{name}.lora_B": layer.b, f"{name}.alpha": layer.gate}
    torch.save(state, tmp_path / "run" / "pytorch_model.bin")
    with pytest.raises(RunError, match="`lora_alpha`"):
        read_run(tmp_path / "run")
    with pytest.raises(RunError, match="`start_rank`"):
        read_run(tmp_path / "run", ReadOptions(lora_alpha=ALPHA))
    run = read_run(tmp_path / "run", OPTIONS)
    assert run.num_labels == 3
    prove(run, ROBERTA, *compare(model, layers), tmp_path, ("peft",))


@pytest.fixture
def layers(llama_base: Path) -> dict[str, Gated]:
    return gate_layers(LlamaForCausalLM.from_pretrained(llama_base), ("q_proj",))


@pytest.mark.parametrize(
    "gate", ["gate", "lora_gate", "alpha", "lora_scaler", "lora_E", "switch", "lora_gate.weight"]
)
def test_any_vector_of_r_numbers_is_the_gate(
    tmp_path: Path, layers: dict[str, Gated], gate: str
) -> None:
    write_adapter_folder(tmp_path / "run", layers, gate)
    run = read_run(tmp_path / "run", OPTIONS)
    module, layer = next(iter(layers.items()))
    update = run.updates[module].components()
    assert run.method == "gated"
    assert update is not None
    assert torch.equal(update.c, layer.gate * ALPHA / RANK)


@pytest.mark.parametrize(("shape", "fine"), [((4, 1), True), ((1, 4), True), ((2, 2), False)])
def test_a_gate_lies_or_stands(
    tmp_path: Path, layers: dict[str, Gated], shape: tuple[int, int], fine: bool
) -> None:
    for layer in layers.values():
        layer.gate = layer.gate.view(shape)
    write_adapter_folder(tmp_path / "run", layers, "gate")
    if fine:
        run = read_run(tmp_path / "run", OPTIONS)
        assert {run.strip().rank(module) for module in run.updates} == {2}
    else:
        with pytest.raises(RunError, match="one per component"):
            read_run(tmp_path / "run", OPTIONS)


def test_two_gates_need_a_name(tmp_path: Path, layers: dict[str, Gated]) -> None:
    write_adapter_folder(tmp_path / "run", layers, "gate", r=RANK, lora_alpha=ALPHA)

    def another(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith(".gate")]:
            state[name.replace(".gate", ".alpha")] = torch.ones(RANK)

    change_bin(tmp_path / "run", another)
    with pytest.raises(RunError, match=r"alpha, gate(.|\n)*`gate`"):
        read_run(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(gate="alpha"))
    assert {run.strip().rank(module) for module in run.updates} == {RANK}
    with pytest.raises(RunError, match="expected: mask"):
        read_run(tmp_path / "run", ReadOptions(gate="mask"))


@pytest.mark.parametrize(
    ("ending", "times", "message"),
    [
        ("gate", 0, "incomplete"),
        ("lora_A.weight", 0, "incomplete"),
        ("lora_B.weight", 0, "incomplete"),
        ("gate", 2, "4 numbers"),
        ("lora_B.weight", 2, "different rank"),
    ],
)
def test_damaged_parts(
    tmp_path: Path, layers: dict[str, Gated], ending: str, times: int, message: str
) -> None:
    write_adapter_folder(tmp_path / "run", layers, "gate", r=RANK, lora_alpha=ALPHA)

    def damage(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.endswith(f"layers.1.self_attn.q_proj.{ending}"))
        tensor = state.pop(name)
        if times:
            state[name] = torch.cat([tensor] * times, dim=-1)

    change_bin(tmp_path / "run", damage)
    with pytest.raises(RunError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "use_rslora"])
def test_scales_of_another_kind_are_refused(
    tmp_path: Path, layers: dict[str, Gated], key: str
) -> None:
    write_adapter_folder(tmp_path / "run", layers, "gate", r=4, lora_alpha=4, **{key: {"q": 1}})
    with pytest.raises(RunError, match=key):
        read_run(tmp_path / "run")


def test_sora_with_a_missing_gate(tmp_path: Path) -> None:
    shutil.copytree(SORA / "run", tmp_path / "run")

    def damage(state: dict[str, torch.Tensor]) -> None:
        del state["roberta.encoder.layer.1.output.dense.lora.gate"]

    change_bin(tmp_path / "run", damage)
    with pytest.raises(RunError, match=r"incomplete(.|\n)*layer.1.output.dense.gate"):
        read_run(tmp_path / "run", ReadOptions(lora_alpha=16))
