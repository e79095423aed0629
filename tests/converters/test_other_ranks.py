"""IncreLoRA, AFLoRA and DyLoRA by runs of their own code, see `tests/data/methods/`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from converters.errors import BaseError, RunError, TargetError
from converters.readers import ReadOptions
from dora_serve import merge, read_run, write_adapter
from dora_serve.proof.verify import verification_batch
from tests.conftest import DATA
from tests.converters.proving import Inputs, change_bin, expected, logits, prove

METHODS, BASES = DATA / "methods", DATA / "reference" / "bases"
INCRELORA, GSM8K, GLUE, DYLORA = (
    METHODS / n for n in ("increlora", "aflora_gsm8k", "aflora_glue", "dylora")
)
RANK, ALPHA = 6, 9


@pytest.mark.supports(method="increlora", family="roberta", targets=("merged", "peft"))
def test_increlora(tmp_path: Path) -> None:
    run = read_run(INCRELORA / "run")
    prove(run, BASES / "roberta", *expected(INCRELORA), tmp_path, ("peft",))
    stripped = run.strip()
    ranks = {module: stripped.rank(module) for module in run.updates}
    # The reserve of each module is stored too, with E = 0.
    assert {m: rank - 1 for m, rank in run.start_rank.items()} == ranks
    assert set(ranks.values()) == {1, 4}


def test_increlora_divides_as_its_authors_do() -> None:
    """By ranknum + 1e-5, which no logits tell from ranknum."""
    run = read_run(INCRELORA / "run")
    state = torch.load(INCRELORA / "run" / "pytorch_model.bin", weights_only=True)
    alpha = json.loads((INCRELORA / "run" / "config.json").read_text())["lora_alpha"]
    assert run.updates
    for name in run.updates:
        update = run.updates[name].components()
        count = sum(f"{name}.lora_E.{i}" in state for i in range(9))
        e = torch.cat([state[f"{name}.lora_E.{i}"].flatten() for i in range(count)]).double()
        assert update is not None
        scaled = e * alpha / (float(state[f"{name}.ranknum"]) + 1e-5)
        assert torch.allclose(update.c.double(), scaled, rtol=1e-7, atol=0)


@pytest.mark.parametrize("lost", ["lora_A.1", "lora_E.1", "lora_B.0", "lora_E.0", "ranknum"])
def test_increlora_with_a_missing_piece(tmp_path: Path, lost: str) -> None:
    shutil.copytree(INCRELORA / "run", tmp_path / "run")
    module = "roberta.encoder.layer.1.attention.self.value"
    change_bin(tmp_path / "run", lambda state: _drop(state, f"{module}.{lost}"))
    with pytest.raises(RunError, match=rf"not complete(.|\n)*{module}"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("part", ["lora_A.1", "lora_E.1", "lora_B.1"])
def test_increlora_with_a_piece_of_another_size(tmp_path: Path, part: str) -> None:
    shutil.copytree(INCRELORA / "run", tmp_path / "run")

    def damage(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.endswith(part))
        state[name] = state[name].repeat(2, 2)

    change_bin(tmp_path / "run", damage)
    with pytest.raises(RunError, match="fit"):
        read_run(tmp_path / "run")


def test_a_checkpoint_knows_its_base(tmp_path: Path) -> None:
    shutil.copytree(BASES / "roberta", tmp_path / "base")

    def damage(state: dict[str, torch.Tensor]) -> None:
        state["roberta.encoder.layer.0.attention.self.query.weight"] += 0.01

    change_bin(tmp_path / "base", damage)
    with pytest.raises(BaseError, match="not the base the run was trained on"):
        merge(read_run(INCRELORA / "run"), tmp_path / "out", base=tmp_path / "base")


def test_an_adapter_of_a_whole_checkpoint_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"which of its tensors were trained(.|\n)*`base`"):
        write_adapter(read_run(INCRELORA / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _drop(state: dict[str, torch.Tensor], name: str) -> None:
    del state[name]


class DyLinear(nn.Module):
    """DyLoRA, arXiv 2210.07558, as its loralib computes: b components in use, √(r/b) on A and B."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = torch.randn(RANK, linear.in_features) * 0.2
        self.b = torch.randn(linear.out_features, RANK) * 0.2
        self.in_use = 0

    def nested(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[:, : self.in_use] * math.sqrt(RANK / self.in_use)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        if self.in_use:
            result = result + x @ self.nested(self.a.T) @ self.nested(self.b).T * (ALPHA / RANK)
        return result


def dylora_run(model: Any, folder: Path, names: tuple[str, ...]) -> list[DyLinear]:
    """Write `model` with nested adapters as a full checkpoint; its adapted layers."""
    torch.manual_seed(3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": ALPHA}))
    layers = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(names):
            layers.append(DyLinear(module))
            model.set_submodule(name, layers[-1])
            state |= {f"{name}.lora_A": layers[-1].a, f"{name}.lora_B": layers[-1].b}
    torch.save(state, folder / "pytorch_model.bin")
    return layers


def dylora_logits(model: Any, layers: list[DyLinear], rank: int, inputs: Inputs) -> torch.Tensor:
    for layer in layers:
        layer.in_use = rank
    return logits(model, inputs)


@pytest.mark.parametrize("rank", [2, RANK])
def test_dylora_as_published_on_llama(tmp_path: Path, llama_base: Path, rank: int) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    layers = dylora_run(model, tmp_path / "run", ("q_proj", "up_proj"))
    inputs = verification_batch(model)
    truth, control = (dylora_logits(model, layers, n, inputs) for n in (rank, 0))
    run = read_run(tmp_path / "run", ReadOptions(rank=rank))
    prove(run, llama_base, inputs, truth, control, tmp_path)
    assert {run.rank(module) for module in run.updates} == {rank}
    assert set(run.start_rank.values()) == {RANK}


@pytest.mark.supports(method="dylora", family="roberta", targets=("merged", "peft"))
@pytest.mark.parametrize("rank", [1, 2, RANK])
def test_dylora_of_its_authors(tmp_path: Path, rank: int) -> None:
    stored = load_file(DYLORA / "expected.safetensors")
    inputs = {name: stored[name] for name in ("input_ids", "attention_mask")}
    run = read_run(DYLORA / "run", ReadOptions(rank=rank))
    truth, control = stored[f"logits.{rank}"], stored["base_logits"]
    prove(run, BASES / "roberta", inputs, truth, control, tmp_path, ("peft",))


@pytest.mark.parametrize("rank", [None, 0, RANK + 1])
def test_dylora_needs_the_number_of_components_in_use(
    tmp_path: Path, llama_base: Path, rank: int | None
) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    dylora_run(model, tmp_path / "run", ("q_proj",))
    with pytest.raises(RunError, match=r"from 1 to 6(.|\n)*`rank`"):
        read_run(tmp_path / "run", ReadOptions(rank=rank))


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_dylora_with_a_missing_part(tmp_path: Path, llama_base: Path, lost: str) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    dylora_run(model, tmp_path / "run", ("q_proj",))
    name = f"model.layers.1.self_attn.q_proj.{lost}"
    change_bin(tmp_path / "run", lambda state: _drop(state, name))
    with pytest.raises(RunError, match="incomplete"):
        read_run(tmp_path / "run", ReadOptions(rank=1))


@pytest.mark.supports(method="aflora (GSM8K)", family="llama", targets=("merged", "peft", "vllm"))
def test_aflora_of_the_gsm8k_fork(tmp_path: Path) -> None:
    prove(read_run(GSM8K / "run"), BASES / "llama", *expected(GSM8K), tmp_path)


@pytest.mark.supports(method="aflora (GLUE)", family="roberta", targets=("merged", "peft"))
def test_aflora_of_the_glue_fork(tmp_path: Path) -> None:
    run = read_run(GLUE / "run")
    prove(run, BASES / "roberta", *expected(GLUE), tmp_path, ("peft",))
    assert run.options == {"nonlin": 5}


def configure(source: Path, folder: Path, **change: Any) -> Path:
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


@pytest.mark.parametrize(
    ("nonlin", "function"),
    list(
        enumerate(
            [
                nn.Identity(),
                torch.relu,
                torch.abs,
                nn.Softplus(),
                nn.GELU(),
                torch.tanh,
                torch.sigmoid,
            ]
        )
    ),
)
def test_every_nonlin_of_the_glue_fork(tmp_path: Path, nonlin: int, function: Any) -> None:
    run = read_run(configure(GLUE / "run", tmp_path / "run", nonlin=nonlin))
    state = torch.load(GLUE / "run" / "adapter_model.bin", weights_only=True)
    module = next(iter(run.updates))
    update = run.updates[module].components()
    assert update is not None
    assert torch.allclose(update.c, function(state[f"base_model.model.{module}.lora_d"]))


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (GLUE, {"nonlin": None}, '"nonlin": N'),
        (GLUE, {"nonlin": 7}, "from 0 to 6"),
        (GLUE, {"identity": True}, "not stored"),
        (GSM8K, {"lora_alpha": None}, "`lora_alpha`"),
    ],
)
def test_aflora_leaves_nothing_to_guess(
    tmp_path: Path, source: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        read_run(configure(source / "run", tmp_path / "run", **change))


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_d", "lora_db"])
@pytest.mark.parametrize("larger", [True, False])
def test_aflora_with_a_damaged_part(tmp_path: Path, part: str, larger: bool) -> None:
    shutil.copytree(GSM8K / "run", tmp_path / "run")

    def damage(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.endswith(part))
        tensor = state.pop(name)
        if larger:
            state[name] = tensor.repeat(*[2] * tensor.dim())

    change_bin(tmp_path / "run", damage)
    with pytest.raises(RunError, match=r"incomplete|different rank|does not fit"):
        read_run(tmp_path / "run")
