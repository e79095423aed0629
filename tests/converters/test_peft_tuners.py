"""PEFT's tuners, from training library to merged model, compared with PEFT's own live model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
)

from converters.errors import RunError
from converters.run import Run
from converters.updates.peft_layer import LayerUpdate
from dora_serve import DoraExportError, ReadOptions, merge, read_run, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import tiny_llama

TARGETS = {"target_modules": ["q_proj", "v_proj", "up_proj"]}

# Tuner: what its config takes to be small; a second word tells variants apart.
LLAMA: dict[str, dict[str, Any]] = {
    "AdamssConfig": {"r": 8},
    "BOFTConfig": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "C3AConfig": {"block_size": 8},
    "DeftConfig": {"r": 4},
    "DeloraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 50, "scaling": 100.0},
    "FrodConfig": {},
    "GloraConfig": {"r": 4},
    "GraloraConfig": {"r": 4, "gralora_k": 2, "hybrid_r": 1},
    "HiraConfig": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "HRAConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": ["up_proj"]},
    "LNTuningConfig": {"target_modules": ["input_layernorm", "norm"]},
    "LoHaConfig": {"r": 4, "alpha": 6},
    "LoKrConfig": {"r": 4, "alpha": 6},
    "LoKrConfig decomposed": {"r": 2, "decompose_both": True, "decompose_factor": 4},
    "MissConfig": {"r": 4},
    "MissConfig bat": {"r": 4, "init_weights": "bat", "target_modules": ["q_proj"]},
    "MissConfig mini": {"r": 4, "init_weights": "mini", "mini_r": 4},
    "OFTConfig": {"r": 0, "oft_block_size": 8},
    "OSFConfig": {},
    "PeanutConfig": {"r": 4},
    "PsoftConfig": {"r": 4},
    "PveraConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "RandLoraConfig unsaved": {"r": 4, "save_projection": False},
    "RoadConfig": {"group_size": 16},
    "ShiraConfig": {"r": 4},
    "SupertuningConfig": {"sparsity": 0.5},
    "SupertuningConfig unsaved": {"sparsity": 0.5, "save_precomputed_indices": False},
    "TinyLoraConfig": {},
    "TrainableTokensConfig": {"token_indices": list(range(20)), "target_modules": ["embed_tokens"]},
    "UniLoraConfig": {"r": 4, "theta_d_length": 64},
    "VBLoRAConfig": {"r": 4, "num_vectors": 8, "vector_length": 16},
    "VBLoRAConfig topk": {
        "r": 4,
        "num_vectors": 8,
        "vector_length": 16,
        "save_only_topk_weights": True,
    },
    "VeraConfig": {"r": 4},
    "VeraConfig unsaved": {"r": 4, "save_projection": False},
    "WaveFTConfig": {"n_frequency": 50},
}
ROBERTA: dict[str, dict[str, Any]] = {
    "AdamssConfig": {"r": 8, "target_modules": ["value"]},
    "BeftConfig": {"target_modules": ["query", "value"]},
    "GloraConfig": {"r": 4, "target_modules": ["query", "value"]},
    "IA3Config": {
        "target_modules": ["key", "value", "output.dense"],
        "feedforward_modules": ["output.dense"],
    },
    "LNTuningConfig": {"target_modules": ["LayerNorm"]},
    "OFTConfig": {"r": 0, "oft_block_size": 8, "bias": "oft_only", "target_modules": ["value"]},
    "RoadConfig": {"group_size": 16, "target_modules": ["query", "value"]},
}
GPT2: dict[str, dict[str, Any]] = {
    "HiraConfig": {"r": 4, "target_modules": ["c_proj"]},
    "IA3Config": {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"]},
    "VeraConfig": {"r": 4, "target_modules": ["c_attn", "c_proj"]},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower in several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(family: str, configs: dict[str, dict[str, Any]]) -> list[Any]:
    def marks(case: str) -> list[pytest.MarkDecorator]:
        method = "peft_" + case.split()[0].removesuffix("Config").lower()
        return [pytest.mark.supports(method=method, family=family, targets=("merged",))]

    return [pytest.param(case, marks=marks(case), id=case) for case in configs]


def train(model: Any, out: Path, case: str, **config: Any) -> Path:
    """An adapter of `model` with every trainable parameter moved from where it starts."""
    tuned = get_peft_model(model, getattr(peft, case.split()[0])(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad or ".bias" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    tuned.save_pretrained(out)
    return out


def llama(base: Path, out: Path, case: str, **changes: Any) -> Path:
    config = {"task_type": "CAUSAL_LM", **TARGETS, **LLAMA[case], **changes}
    return train(LlamaForCausalLM.from_pretrained(base), out, case, **config)


def compare(live: Any, adapter: Path, base: Path, out: Path, control: Any) -> Run:
    """Merge `adapter` and compare with PEFT's `live` model; `control` is without the update."""
    run = read_run(adapter, ReadOptions(base=base))
    inputs = verification_batch(live)
    truth = logits(live.eval(), inputs)
    assert float((truth - logits(control.eval(), inputs)).abs().max()) > 1e-3
    merge(run, out, base=base)
    merged = logits(type(control).from_pretrained(out).eval(), inputs)
    assert float((merged - truth).abs().max()) <= 1e-4
    assert torch.equal(merged.argmax(-1), truth.argmax(-1))
    return run


@pytest.mark.parametrize("case", cases("llama", LLAMA))
def test_llama(case: str, llama_base: Path, tmp_path: Path) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", case)
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_base), str(adapter))
    control = LlamaForCausalLM.from_pretrained(llama_base)
    compare(live, adapter, llama_base, tmp_path / "out", control)


@pytest.mark.parametrize("case", cases("roberta", ROBERTA))
def test_classifier_with_its_head_and_biases(case: str, roberta_base: Path, tmp_path: Path) -> None:
    def fresh() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(roberta_base, num_labels=3)

    config = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], **ROBERTA[case]}
    adapter = train(fresh(), tmp_path / "adapter", case, **config)
    live = PeftModel.from_pretrained(fresh(), str(adapter))
    without = fresh()  # the trained head on the base, so that the difference is the tuner's
    head = live.base_model.model.classifier.modules_to_save["default"]
    without.classifier.load_state_dict(head.state_dict())
    run = compare(live, adapter, roberta_base, tmp_path / "out", without)
    assert run.num_labels == 3
    assert sum(name.startswith("classifier.") for name in run.replaced) == 4
    _, info = RobertaForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("case", cases("gpt2", GPT2))
def test_conv1d_stored_transposed(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=40)
    ).save_pretrained(base)
    config = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **GPT2[case]}
    adapter = train(GPT2LMHeadModel.from_pretrained(base), tmp_path / "adapter", case, **config)
    live = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), str(adapter))
    compare(live, adapter, base, tmp_path / "out", GPT2LMHeadModel.from_pretrained(base))


def test_trained_tokens_of_a_tied_embedding_reach_the_head(tmp_path: Path) -> None:
    base, case = tmp_path / "base", "TrainableTokensConfig"
    tiny_llama(tie_word_embeddings=True).save_pretrained(base)
    adapter = llama(base, tmp_path / "adapter", case)
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))
    control = LlamaForCausalLM.from_pretrained(base)
    compare(live, adapter, base, tmp_path / "out", control)


def test_torch_file(llama_base: Path, tmp_path: Path) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", "LoHaConfig")
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_base), str(adapter))
    control = LlamaForCausalLM.from_pretrained(llama_base)
    compare(live, adapter, llama_base, tmp_path / "out", control)


@pytest.mark.parametrize("case", ["OFTConfig", "PeanutConfig", "PsoftConfig"])
def test_updates_merge_in_many_threads_and_again(
    case: str, llama_base: Path, tmp_path: Path
) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", case)
    update = next(iter(read_run(adapter, ReadOptions(base=llama_base)).updates.values()))
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(update.shape, generator=generator) for _ in range(12)]
    one_by_one = [update.merge(weight.clone(), 0) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda weight: update.merge(weight.clone(), 0), weights))
    for alone, merged, weight in zip(one_by_one, together, weights, strict=True):
        assert torch.equal(alone, merged)
        assert not torch.equal(alone, weight)


@pytest.mark.parametrize("case", ["OFTConfig", "PsoftConfig"])
def test_a_run_that_is_read_holds_no_base_weights(
    case: str, llama_base: Path, tmp_path: Path
) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", case)
    updates = read_run(adapter, ReadOptions(base=llama_base)).updates
    assert updates
    for update in updates.values():
        assert isinstance(update, LayerUpdate)
        assert update.layer.get_base_layer().weight.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("case", ["OFTConfig", "LNTuningConfig"])
def test_no_lora_adapter_equals_the_update(case: str, llama_base: Path, tmp_path: Path) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", case)
    with pytest.raises(DoraExportError, match="`merge`"):
        write_adapter(adapter, tmp_path / "out", base=llama_base)
    assert not (tmp_path / "out").exists()


def test_psoft_of_a_head_tied_to_the_embedding(tmp_path: Path) -> None:
    base, case = tmp_path / "base", "PsoftConfig"
    tiny_llama(tie_word_embeddings=True).save_pretrained(base)
    adapter = llama(base, tmp_path / "adapter", case, target_modules=["lm_head"])
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))
    control = LlamaForCausalLM.from_pretrained(base)
    compare(live, adapter, base, tmp_path / "out", control)


def test_base_is_asked_for(llama_base: Path, tmp_path: Path) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", "LoHaConfig")
    with pytest.raises(RunError, match="`base`"):
        read_run(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "cannot be merged"),
        ({"peft_type": "ADAPTION_PROMPT"}, "cannot be merged"),
        ({"peft_type": "LILY"}, "cannot be merged"),
        ({"peft_type": "PVERA", "sample_at_inference": True}, "sample_at_inference"),
        ({"r": 2}, "PEFT cannot load"),
        ({"target_modules": ["nothing"]}, "PEFT cannot load"),
        ({"target_modules": ["q_proj", "k_proj"]}, "missing|unknown"),
        ({"target_modules": ["q_proj"]}, "unknown"),
    ],
)
def test_configuration_that_does_not_fit(
    change: dict[str, Any], message: str, llama_base: Path, tmp_path: Path
) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", "LoHaConfig")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RunError, match=message):
        read_run(adapter, ReadOptions(base=llama_base))


@pytest.mark.parametrize("damage", ["missing", "unknown", "NaN", "PEFT cannot load"])
def test_damaged_weights(damage: str, llama_base: Path, tmp_path: Path) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", "LoHaConfig")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name, tensor = next(iter(tensors.items()))
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors["base_model.model.model.layers.7.q_proj.hada_w1_a"] = tensor.clone()
    else:
        tensors[name] = tensor * float("nan") if damage == "NaN" else tensor[:-1].clone()
    save_file(tensors, file)
    with pytest.raises(DoraExportError, match=damage):
        read_run(adapter, ReadOptions(base=llama_base))


def test_base_of_another_size(llama_base: Path, tmp_path: Path) -> None:
    adapter = llama(llama_base, tmp_path / "adapter", "LoHaConfig")
    tiny_llama(hidden_size=16).save_pretrained(tmp_path / "small")
    with pytest.raises(RunError, match="PEFT cannot load"):
        read_run(adapter, ReadOptions(base=tmp_path / "small"))


def test_bias_trained_where_the_base_has_none(llama_base: Path, tmp_path: Path) -> None:
    config = {"task_type": "CAUSAL_LM", **TARGETS}
    model = LlamaForCausalLM.from_pretrained(llama_base)
    adapter = train(model, tmp_path / "adapter", "BeftConfig", **config)
    with pytest.raises(RunError, match="bias that the base does not have"):
        read_run(adapter, ReadOptions(base=llama_base))


def test_rows_that_the_base_does_not_have(llama_base: Path, tmp_path: Path) -> None:
    """Tokens that were added before they were trained: one error, and no traceback."""
    model = LlamaForCausalLM.from_pretrained(llama_base)
    model.resize_token_embeddings(83, mean_resizing=False)
    config = peft.TrainableTokensConfig(token_indices=[81])
    get_peft_model(model, config).save_pretrained(tmp_path / "run")
    with pytest.raises(RunError, match="out of bounds"):
        read_run(tmp_path / "run", ReadOptions(base=llama_base))
