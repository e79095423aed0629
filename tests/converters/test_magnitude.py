"""Weight-decomposed DoRA: merged models equal the live models of PEFT and of the authors' fork.

The runs in data/methods/nvlabs_dora were made by NVlabs' own code; PEFT runs are made here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
)

from converters.readers import ReadOptions
from converters.updates.magnitude import MagnitudeUpdate
from converters.updates.rank_one import RankOneSum
from converters.updates.update import transposed
from dora_serve import DoraExportError, merge, read_run, verify, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import DATA, randomize, tiny_llama

NVLABS = DATA / "methods" / "nvlabs_dora"
WEIGHTS = "adapter_model.safetensors"
LLAMA_CASES: dict[str, dict[str, Any]] = {
    "rslora and patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"mlp.up_proj": 3},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["input_layernorm"]},
}


def shift(model: Any) -> None:
    """Give the fresh adapter values: factors added to, magnitudes scaled."""
    randomize(model, ("lora_A", "lora_B", "lora_embedding", "modules_to_save"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


def make(model: Any, out: Path, task: str = "CAUSAL_LM", **config: Any) -> Any:
    """A `use_dora` adapter of PEFT, saved in `out`; returns the live model."""
    lora = LoraConfig(r=4, lora_alpha=6, task_type=task, use_dora=True, **config)
    live = get_peft_model(model, lora)
    shift(live)
    live.save_pretrained(out)
    return live.eval()


def check_merged(
    adapter: Path,
    base: Path,
    tmp_path: Path,
    load: Callable[[Path], Any],
    inputs: dict[str, torch.Tensor],
    truth: torch.Tensor,
) -> None:
    """Merged logits equal `truth`, the base's do not, and `verify` passes in both dtypes."""
    run = read_run(adapter, ReadOptions(base=base))
    merge(run, tmp_path / "out", base=base)
    merged = logits(load(tmp_path / "out").eval(), inputs)
    assert float((merged - truth).abs().max()) <= 1e-4
    assert torch.equal(merged.argmax(-1), truth.argmax(-1))
    assert verify(run, tmp_path / "out", base).passed
    merge(run, tmp_path / "narrow", base=base, dtype=torch.bfloat16)
    assert verify(run, tmp_path / "narrow", base).passed
    with pytest.raises(DoraExportError, match="`max_rank`"):
        write_adapter(run, tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.supports(method="peft_dora", family="llama", targets=("merged",))
@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama_equals_pefts_live_model(tmp_path: Path, llama_base: Path, case: str) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    inputs = verification_batch(model)
    control = logits(model, inputs)
    truth = logits(make(model, tmp_path / "dora", **LLAMA_CASES[case]), inputs)
    assert float((truth - control).abs().max()) > 1e-2
    check_merged(
        tmp_path / "dora", llama_base, tmp_path, LlamaForCausalLM.from_pretrained, inputs, truth
    )


@pytest.mark.supports(method="peft_dora", family="llama", targets=("merged",))
def test_tied_embedding_whose_norm_is_over_the_vocabulary(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=True).save_pretrained(base)
    make(LlamaForCausalLM.from_pretrained(base), tmp_path / "dora", target_modules=["embed_tokens"])
    model = LlamaForCausalLM.from_pretrained(base)
    inputs = verification_batch(model)
    live = PeftModel.from_pretrained(model, str(tmp_path / "dora")).eval()
    truth = logits(live, inputs)
    check_merged(tmp_path / "dora", base, tmp_path, LlamaForCausalLM.from_pretrained, inputs, truth)


@pytest.mark.supports(method="peft_dora", family="roberta", targets=("merged",))
def test_roberta_classifier_equals_pefts_live_model(tmp_path: Path, roberta_base: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(roberta_base, num_labels=3)
    inputs = verification_batch(model)
    live = make(model, tmp_path / "dora", "SEQ_CLS", target_modules=["query", "dense"])
    truth = logits(live, inputs)
    live.disable_adapter_layers()
    assert float((truth - logits(live, inputs)).abs().max()) > 1e-2
    load = RobertaForSequenceClassification.from_pretrained
    check_merged(tmp_path / "dora", roberta_base, tmp_path, load, inputs, truth)


@pytest.mark.supports(method="peft_dora", family="gpt2", targets=("merged",))
def test_conv1d_is_normed_over_its_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=40)
    base = tmp_path / "base"
    GPT2LMHeadModel(config).save_pretrained(base)
    model = GPT2LMHeadModel.from_pretrained(base)
    inputs = verification_batch(model)
    control = logits(model.eval(), inputs)
    live = make(model, tmp_path / "dora", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    truth = logits(live, inputs)
    assert float((truth - control).abs().max()) > 1e-2
    check_merged(tmp_path / "dora", base, tmp_path, GPT2LMHeadModel.from_pretrained, inputs, truth)


def test_magnitudes_under_the_names_of_other_versions_of_peft(
    tmp_path: Path, llama_base: Path
) -> None:
    folder = tmp_path / "dora"
    model = LlamaForCausalLM.from_pretrained(llama_base)
    live = make(model, folder, target_modules=["q_proj", "v_proj"])
    tensors = load_file(folder / WEIGHTS)
    named = {n + ".weight" if "magnitude" in n else n: t for n, t in tensors.items()}
    save_file(named, folder / WEIGHTS)
    inputs = verification_batch(model)
    load = LlamaForCausalLM.from_pretrained
    check_merged(folder, llama_base, tmp_path, load, inputs, logits(live, inputs))


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        pytest.param(
            "llama",
            LlamaForCausalLM,
            marks=pytest.mark.supports(method="nvlabs_dora", family="llama", targets=("merged",)),
        ),
        pytest.param(
            "roberta",
            RobertaForSequenceClassification,
            marks=pytest.mark.supports(method="nvlabs_dora", family="roberta", targets=("merged",)),
        ),
    ],
)
def test_nvlabs_runs_equal_the_forks_live_logits(tmp_path: Path, name: str, cls: Any) -> None:
    expected = load_file(NVLABS / "expected.safetensors")
    inputs = {"input_ids": expected["input_ids"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    truth = expected[f"{name}-dora"]
    run = read_run(NVLABS / f"{name}-dora", ReadOptions(base=NVLABS / name))
    assert run.method == "nvlabs_dora"
    assert run.num_labels == (3 if name == "roberta" else None)
    check_merged(
        NVLABS / f"{name}-dora", NVLABS / name, tmp_path, cls.from_pretrained, inputs, truth
    )
    if name == "llama":
        control = logits(cls.from_pretrained(NVLABS / name).eval(), inputs)
        assert float((control - truth).abs().max()) > 1e-2
        assert run.start_rank["model.layers.0.mlp.gate_proj"] == 0


def test_an_adapter_of_full_rank_equals_the_live_model(tmp_path: Path) -> None:
    run = read_run(NVLABS / "llama-dora", ReadOptions(base=NVLABS / "llama"))
    write_adapter(run, tmp_path / "full", base=NVLABS / "llama", max_rank=20)
    expected = load_file(NVLABS / "expected.safetensors")
    base = LlamaForCausalLM.from_pretrained(NVLABS / "llama")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "full")).eval()
    with torch.inference_mode():
        deployed = peft(input_ids=expected["input_ids"]).logits
    assert float((deployed - expected["llama-dora"]).abs().max()) <= 1e-4


@pytest.fixture
def update() -> MagnitudeUpdate:
    torch.manual_seed(3)
    delta = RankOneSum(torch.randn(3, 40), torch.tensor([0.5, -1.0, 2.0]), torch.randn(24, 3))
    return MagnitudeUpdate(torch.rand(24) + 0.5, delta)


def test_merge_against_float64(update: MagnitudeUpdate) -> None:
    weight = torch.randn(24, 40)
    moved = weight.double() + (update.delta.b.double() * update.delta.c) @ update.delta.a.double()
    expected = update.magnitude.unsqueeze(1) * moved / moved.norm(dim=1, keepdim=True)
    for merged in (
        update.merge(weight.clone(), 0),
        transposed(update).merge(weight.T.contiguous(), 0).T,
        transposed(transposed(update)).merge(weight.clone(), 0),
    ):
        error = (merged.double() - expected).abs() / expected.norm(dim=1, keepdim=True)
        assert float(error.max()) <= 1e-6


def test_blocks_of_rows_equal_the_whole(update: MagnitudeUpdate) -> None:
    weight = torch.randn(24, 40)
    whole = update.merge(weight.clone(), 0)
    parts = [update.merge(weight[i : i + 7].clone(), i) for i in range(0, 24, 7)]
    assert not update.whole
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)
    assert transposed(update).whole
    assert transposed(update).shape == (40, 24)


def test_magnitude_alone_sets_the_length_of_rows() -> None:
    nothing = RankOneSum(torch.zeros(0, 5), torch.zeros(0), torch.zeros(3, 0))
    merged = MagnitudeUpdate(torch.tensor([1.0, 2.0, 3.0]), nothing).merge(torch.randn(3, 5), 0)
    torch.testing.assert_close(merged.norm(dim=1), torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="does not fit"):
        MagnitudeUpdate(torch.ones(4), nothing)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no magnitudes", "has no magnitude"),
        ("one magnitude less", "1 of 2 modules"),
        ("no dora", "use_dora: false"),
        ("short magnitude", "does not fit lora_B"),
        ("no factors", "without lora_A and lora_B"),
        ("no lora_B", "incomplete"),
    ],
)
def test_bad_peft_adapters(tmp_path: Path, llama_base: Path, damage: str, message: str) -> None:
    folder = tmp_path / "dora"
    make(LlamaForCausalLM.from_pretrained(llama_base), folder, target_modules=["q_proj"])
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = load_file(folder / WEIGHTS)
    magnitude = prefix + "lora_magnitude_vector"
    if damage == "no magnitudes":
        tensors = {name: t for name, t in tensors.items() if "magnitude" not in name}
    elif damage == "one magnitude less":
        del tensors[magnitude]
    elif damage == "no dora":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    elif damage == "short magnitude":
        tensors[magnitude] = tensors[magnitude][:-1].clone()
    elif damage == "no factors":
        del tensors[prefix + "lora_A.weight"], tensors[prefix + "lora_B.weight"]
    else:
        del tensors[prefix + "lora_B.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(DoraExportError, match=message):
        read_run(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no base", "`base`"),
        ("other base", "no such linear layer"),
        ("no magnitude", "has no magnitude"),
        ("flat magnitude", "magnitude does not fit"),
        ("no lora_B", "incomplete"),
        ("other rank", "stored rank differs"),
        ("no alpha", "`lora_alpha`"),
    ],
)
def test_bad_nvlabs_adapters(tmp_path: Path, damage: str, message: str) -> None:
    source = NVLABS / "llama-dora"
    tensors = torch.load(source / "adapter_model.bin", weights_only=True)
    config = json.loads((source / "adapter_config.json").read_text())
    base: Path | None = NVLABS / ("roberta" if damage == "other base" else "llama")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    magnitude = prefix + "weight_m_wdecomp.weight"
    if damage == "no base":
        base = None
    elif damage == "no magnitude":
        del tensors[magnitude]
    elif damage == "flat magnitude":
        tensors[magnitude] = tensors[magnitude].squeeze(1)
    elif damage == "no lora_B":
        del tensors[prefix + "lora_B.weight"]
    elif damage == "other rank":
        config["r"] = 8
    elif damage == "no alpha":
        config["lora_alpha"] = None
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DoraExportError, match=message):
        read_run(tmp_path, ReadOptions(base=base))
