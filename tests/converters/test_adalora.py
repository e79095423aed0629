"""AdaLoRA: PEFT's, pruned here by PEFT itself, and the authors' (`tests/data/methods/`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
)

from converters.errors import RunError
from converters.readers import ReadOptions
from dora_serve import read_run
from dora_serve.proof.verify import verification_batch
from tests.conftest import DATA
from tests.converters.proving import change_bin, expected, logits, prove

INIT_R, STEPS, FINAL = 4, 6, 2
Change = dict[str, Any]


def train(model: Any, out: Path, allocate: bool, **config: Any) -> Any:
    """Train `model` with AdaLoRA for a few steps and save the adapter; the live model."""
    torch.manual_seed(0)
    peft = get_peft_model(
        model,
        AdaLoraConfig(
            init_r=INIT_R,
            target_r=2,
            tinit=1,
            tfinal=FINAL,
            deltaT=1,
            total_step=STEPS,
            lora_alpha=24,
            **config,
        ),
    )
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.05)
    inputs = verification_batch(model, seed=1)
    labels = inputs["input_ids"]
    if config["task_type"] == "SEQ_CLS":
        labels = labels[:, 1] % model.config.num_labels
    for step in range(STEPS):
        peft(**inputs, labels=labels).loss.backward()
        optimizer.step()
        if allocate:
            peft.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    peft.save_pretrained(out)
    return peft.eval()


def check(
    base: Path, model: Any, live: Any, adapter: Path, out: Path, targets: tuple[str, ...]
) -> None:
    inputs = verification_batch(live)
    truth = logits(live, inputs)
    loaded = PeftModel.from_pretrained(model, str(adapter))
    assert float((logits(loaded, inputs) - truth).abs().max()) <= 1e-5
    with live.disable_adapter():
        control = logits(live, inputs)
    prove(read_run(adapter), base, inputs, truth, control, out, targets)


@pytest.mark.supports(method="peft_adalora", family="llama", targets=("merged", "peft", "vllm"))
@pytest.mark.parametrize("allocate", [True, False])
def test_peft_adalora_on_llama(tmp_path: Path, llama_base: Path, allocate: bool) -> None:
    def fresh() -> Any:
        return LlamaForCausalLM.from_pretrained(llama_base)

    adapter = tmp_path / "adapter"
    modules = ["q_proj", "v_proj", "down_proj"]
    live = train(fresh(), adapter, allocate, task_type="CAUSAL_LM", target_modules=modules)
    config = live.peft_config["default"]
    emptied = "model.layers.1.self_attn.q_proj"
    if allocate:  # one module without any component
        config.rank_pattern[f"{emptied}.lora_E"] = [False] * INIT_R
        with torch.no_grad():
            live.get_parameter(f"base_model.model.{emptied}.lora_E.default").zero_()
        live.save_pretrained(adapter)
    assert (config.rank_pattern is not None) == allocate
    check(llama_base, fresh(), live, adapter, tmp_path, ("peft", "vllm"))

    run = read_run(adapter)
    assert run.finished == allocate
    assert ("stopped before" in "".join(run.warnings)) != allocate
    assert set(run.start_rank.values()) == {INIT_R}
    ranks = {module: run.rank(module) for module in run.updates}
    assert ranks[emptied] == (0 if allocate else INIT_R)
    assert (set(ranks.values()) == {INIT_R}) != allocate


@pytest.mark.supports(method="peft_adalora", family="roberta", targets=("merged", "peft"))
def test_peft_adalora_classifier(tmp_path: Path, roberta_base: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(5)
        return RobertaForSequenceClassification.from_pretrained(roberta_base, num_labels=3)

    adapter = tmp_path / "adapter"
    live = train(
        fresh(),
        adapter,
        True,
        task_type="SEQ_CLS",
        target_modules=["query", "value", "intermediate.dense"],
        modules_to_save=["classifier"],
    )
    check(roberta_base, fresh(), live, adapter, tmp_path, ("peft",))
    run = read_run(adapter)
    assert (run.task, run.num_labels) == ("sequence-classification", 3)


@pytest.mark.supports(method="peft_adalora", family="gpt2", targets=("merged", "peft"))
def test_peft_adalora_on_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 80, "n_positions": 40}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(base)
    live = train(
        GPT2LMHeadModel.from_pretrained(base),
        tmp_path / "adapter",
        True,
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
    )
    model = GPT2LMHeadModel.from_pretrained(base)
    check(base, model, live, tmp_path / "adapter", tmp_path, ("peft",))


@pytest.fixture(scope="module")
def adapter(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adalora") / "adapter"
    model = LlamaForCausalLM.from_pretrained(llama_base)
    train(model, out, True, task_type="CAUSAL_LM", target_modules=["q_proj"])
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": None}, "`lora_alpha`"),
        ({"lora_alpha": 0}, "`lora_alpha`"),
        ({"init_r": None}, "`start_rank`"),
        ({"init_r": 5}, "of init_r 5"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": 2}}, "not AdaLoRA's"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "another adapter"),
        ({"rank_pattern": None}, "differs from the configuration"),
        # Taken for a gated run, whose scale has another divisor:
        ({"peft_type": None, "rank_pattern": None}, "no run found"),
        ({"peft_type": "LORA", "rank_pattern": None}, "no run found"),
    ],
)
def test_peft_adalora_with_another_configuration(
    tmp_path: Path, adapter: Path, change: Change, message: str
) -> None:
    shutil.copytree(adapter, tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RunError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_E"])
@pytest.mark.parametrize("cut", [True, False])
def test_peft_adalora_with_a_damaged_part(
    tmp_path: Path, adapter: Path, part: str, cut: bool
) -> None:
    def damage(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.endswith(part))
        tensor = state.pop(name)
        if cut:
            state[name] = tensor.repeat(2, 2)

    shutil.copytree(adapter, tmp_path / "run")
    change_bin(tmp_path / "run", damage)
    with pytest.raises(RunError, match="lora_"):
        read_run(tmp_path / "run")


LORALIB = DATA / "methods" / "loralib_adalora"
DEBERTA = DATA / "methods" / "bases" / "deberta"


@pytest.mark.supports(method="loralib_adalora", family="deberta-v2", targets=("merged", "peft"))
def test_loralib_adalora(tmp_path: Path) -> None:
    run = read_run(LORALIB / "run")
    prove(run, DEBERTA, *expected(LORALIB), tmp_path, ("peft",))
    ranks = [run.strip().rank(module) for module in run.updates]
    assert set(run.start_rank.values()) == {4}
    assert 0 in ranks
    assert 4 in ranks
    assert run.num_labels == 3


def test_loralib_adalora_without_ranknum(tmp_path: Path) -> None:
    shutil.copytree(LORALIB / "run", tmp_path / "run")
    change_bin(tmp_path / "run", lambda state: _drop(state, "ranknum"))
    before, after = read_run(LORALIB / "run"), read_run(tmp_path / "run")
    assert before.updates
    for module in before.updates:
        left, right = (run.updates[module].components() for run in (before, after))
        assert left is not None
        assert right is not None
        assert torch.equal(left.c, right.c)


def _drop(state: dict[str, torch.Tensor], ending: str) -> None:
    for name in [name for name in state if name.endswith(ending)]:
        del state[name]


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("layer.0.output.dense.lora_E", "incomplete"),
        ("layer.0.output.dense.lora_A", "incomplete"),
        ("layer.0.output.dense.lora_B", "incomplete"),
    ],
)
def test_loralib_adalora_with_a_missing_part(tmp_path: Path, ending: str, message: str) -> None:
    shutil.copytree(LORALIB / "run", tmp_path / "run")
    change_bin(tmp_path / "run", lambda state: _drop(state, ending))
    with pytest.raises(RunError, match=message):
        read_run(tmp_path / "run")


def test_loralib_adalora_alpha_is_never_guessed(tmp_path: Path) -> None:
    shutil.copytree(LORALIB / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    alpha = config.pop("lora_alpha")
    path.write_text(json.dumps(config))
    with pytest.raises(RunError, match="`lora_alpha`"):
        read_run(tmp_path / "run")
    assert read_run(tmp_path / "run", ReadOptions(lora_alpha=alpha)).options["lora_alpha"] == alpha
