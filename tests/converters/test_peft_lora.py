"""PEFT runs, from training library to merged model and adapter, compared on logits.

PEFT's own live model is the truth here, so that our live model is put to the test as well.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
)

from converters.readers import ReadOptions
from converters.readers.peft_common import Scaling
from dora_serve import DoraExportError, merge, read_run, verify, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import MODELS, quick, randomize, tiny_llama

LLAMA_CASES: dict[str, dict[str, Any]] = {
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"mlp.up_proj": 3},
    },
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "whole norm": {"target_modules": ["k_proj"], "modules_to_save": ["input_layernorm"]},
}


def make(base: Path, out: Path, **config: Any) -> Path:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config),
    )
    randomize(model, ("lora_", "modules_to_save", ".bias"))
    model.save_pretrained(out)
    return out


def peft_logits(base: Path, adapter: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter)).eval()
    return logits(live, inputs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", quick(LLAMA_CASES, "patterns", "embedding", "whole head"))
def test_merged_and_repacked_llama_equal_pefts_live_model(
    tmp_path: Path, case: str, tied: bool
) -> None:
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    adapter = make(base, tmp_path / "lora", **LLAMA_CASES[case])
    run = read_run(adapter)
    model = LlamaForCausalLM.from_pretrained(base)
    inputs = verification_batch(model)
    truth = peft_logits(base, adapter, inputs)
    control = logits(model, inputs)
    assert float((truth - control).abs().max()) > 1e-2

    merge(run, tmp_path / "out", base=base)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert float((logits(merged, inputs) - truth).abs().max()) <= 1e-4
    write_adapter(run, tmp_path / "adapter", base=base)
    assert float((peft_logits(base, tmp_path / "adapter", inputs) - truth).abs().max()) <= 1e-4
    for artifact in ("out", "adapter"):
        assert verify(run, tmp_path / artifact, base).passed


def test_tied_head_stays_what_it_was_when_only_the_embedding_was_trained(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=True).save_pretrained(base)
    adapter = make(base, tmp_path / "lora", target_modules=["embed_tokens"])
    merge(adapter, tmp_path / "out", base=base)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    original = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, original)
    assert not torch.equal(model.model.embed_tokens.weight, original)


def test_conv1d_base_stored_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=40)
    base = tmp_path / "base"
    GPT2LMHeadModel(config).save_pretrained(base)
    # c_proj of the attention is square: only the layer's type tells its orientation.
    lora = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(GPT2LMHeadModel.from_pretrained(base), lora)
    randomize(peft)
    peft.save_pretrained(tmp_path / "lora")
    run = read_run(tmp_path / "lora")
    inputs = verification_batch(peft)
    truth = logits(peft.eval(), inputs)
    merge(run, tmp_path / "out", base=base)
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert float((logits(merged, inputs) - truth).abs().max()) <= 1e-4
    write_adapter(run, tmp_path / "adapter", base=base)
    assert verify(run, tmp_path / "adapter", base).passed
    assert verify(run, tmp_path / "out", base).passed


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_classifier_with_head_and_biases(tmp_path: Path, roberta_base: Path, bias: str) -> None:
    lora = LoraConfig(
        r=3, lora_alpha=6, target_modules=["query", "value"], bias=bias, task_type="SEQ_CLS"
    )
    model = AutoModelForSequenceClassification.from_pretrained(roberta_base, num_labels=3)
    peft = get_peft_model(model, lora)
    randomize(peft, ("lora_", "modules_to_save", ".bias"))
    peft.save_pretrained(tmp_path / "lora")
    run = read_run(tmp_path / "lora")
    inputs = verification_batch(peft)
    fresh = AutoModelForSequenceClassification.from_pretrained(roberta_base, num_labels=3)
    live = PeftModel.from_pretrained(fresh, str(tmp_path / "lora")).eval()
    truth = logits(live, inputs)
    merge(run, tmp_path / "out", base=roberta_base)
    merged, info = RobertaForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.config.num_labels == 3
    assert float((logits(merged.eval(), inputs) - truth).abs().max()) <= 1e-4
    write_adapter(run, tmp_path / "adapter", base=roberta_base)
    assert verify(run, tmp_path / "adapter", roberta_base).passed
    with pytest.raises(DoraExportError, match="cannot carry"):
        write_adapter(run, tmp_path / "vllm", base=roberta_base, target="vllm")
    assert not (tmp_path / "vllm").exists()


def test_bf16_merge_is_the_rounded_float32_merge(
    tmp_path: Path, llama_base: Path, llama_lora: Path
) -> None:
    merge(llama_lora, tmp_path / "wide", base=llama_base)
    merge(llama_lora, tmp_path / "narrow", base=llama_base, dtype=torch.bfloat16)
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")
    base = load_file(llama_base / "model.safetensors")
    assert wide.keys() == narrow.keys() == base.keys()
    for name, tensor in wide.items():
        assert torch.equal(tensor.bfloat16(), narrow[name])
    changed = {name for name in base if not torch.equal(base[name], wide[name])}
    assert changed == {f"{module}.weight" for module in read_run(llama_lora).updates}
    assert verify(read_run(llama_lora), tmp_path / "narrow", llama_base).passed


def test_float32_merge_against_float64(tmp_path: Path, llama_base: Path, llama_lora: Path) -> None:
    run = read_run(llama_lora)
    merge(run, tmp_path / "out", base=llama_base)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(llama_base / "model.safetensors")
    assert len(run.updates) == 6
    for module in run.updates:
        update = run.updates[module].components()
        assert update is not None
        delta = (update.b.double() * update.c.double()) @ update.a.double()
        expected = base[f"{module}.weight"].double() + delta
        error = (merged[f"{module}.weight"].double() - expected).abs()
        assert float((error / expected.norm(dim=1, keepdim=True)).max()) <= 1e-6


@pytest.mark.parametrize("damage", ["left out", "halved", "transposed"])
def test_verify_finds_a_wrong_artifact(
    tmp_path: Path, llama_base: Path, llama_lora: Path, damage: str
) -> None:
    merge(llama_lora, tmp_path / "out", base=llama_base)
    path = tmp_path / "out" / "model.safetensors"
    merged, base = load_file(path), load_file(llama_base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    delta = merged[name] - base[name]
    factor = {"left out": 0 * delta, "halved": delta / 2, "transposed": delta.T}[damage]
    save_file({**merged, name: (base[name] + factor).contiguous()}, path, {"format": "pt"})
    assert not verify(read_run(llama_lora), tmp_path / "out", llama_base).passed


def test_a_norm_beside_frozen_embeddings_is_saved_under_its_own_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
    )
    base = tmp_path / "base"
    BertModel(config).save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["embeddings.LayerNorm"])
    peft = get_peft_model(BertModel.from_pretrained(base), lora)
    randomize(peft, ("lora_", "LayerNorm.modules_to_save"))
    peft.save_pretrained(tmp_path / "lora")
    inputs = verification_batch(peft)
    truth = logits(peft.eval(), inputs)
    write_adapter(tmp_path / "lora", tmp_path / "adapter", base=base)
    live = PeftModel.from_pretrained(BertModel.from_pretrained(base), str(tmp_path / "adapter"))
    assert float((logits(live.eval(), inputs) - truth).abs().max()) <= 1e-4
    assert float((logits(BertModel.from_pretrained(base), inputs) - truth).abs().max()) > 1e-2


def test_the_tokenizer_that_was_saved_with_the_run(tmp_path: Path) -> None:
    """As trainers save it into the adapter's folder."""
    base = Path(shutil.copytree(MODELS / "tiny-llama-base", tmp_path / "base"))
    (base / "chat_template.jinja").write_text("the base's")
    run = make(base, tmp_path / "run", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llama-base")
    tokenizer.add_tokens(["<added>"])
    tokenizer.chat_template = "the run's"
    tokenizer.save_pretrained(run)
    merge(run, tmp_path / "out", base=base)
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.chat_template == "the run's"
    assert merged("moon <added>")["input_ids"] == tokenizer("moon <added>")["input_ids"]
    (run / "tokenizer_config.json").unlink()
    merge(run, tmp_path / "out", base=base, force=True)
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.chat_template == "the base's"
    assert "<added>" not in merged.get_vocab()


def test_a_state_dict_as_the_model_has_it(tmp_path: Path) -> None:
    """Factors under the adapter's name are read as such, and not taken for whole tensors; the head
    is read; of two adapters in one file none is."""
    tiny_llama().save_pretrained(tmp_path / "base")
    lora = {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}
    run = make(tmp_path / "base", tmp_path / "run", **lora)
    expected = read_run(run).replaced["lm_head.weight"].load()
    module = "model.layers.0.self_attn.k_proj"
    update = read_run(run).updates[module].components()
    file = run / "adapter_model.safetensors"
    saved = load_file(file)
    head = saved.pop("base_model.model.lm_head.weight")
    wrapped = {"base_model.model.lm_head.modules_to_save.default.weight": head}
    wrapped["base_model.model.lm_head.original_module.weight"] = head * 0
    save_file({**saved, **wrapped}, file)
    assert torch.equal(read_run(run).replaced["lm_head.weight"].load(), expected)
    named = {n.replace(".weight", ".default.weight"): t for n, t in saved.items()}
    save_file(named, file)
    again = read_run(run)
    found = again.updates[module].components()
    assert update is not None and found is not None and not again.replaced
    assert torch.equal(found.a, update.a) and torch.equal(found.b, update.b)
    other = {n.replace(".default", ".other"): t.clone() for n, t in named.items()}
    save_file({**named, **other}, file)
    with pytest.raises(DoraExportError, match="several adapters"):
        read_run(run)


def test_a_quantized_base_keeps_its_dtypes(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    run = make(tmp_path / "base", tmp_path / "run", target_modules=["k_proj"])
    config = tmp_path / "base" / "config.json"
    told = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(told))
    with pytest.raises(DoraExportError, match="before it was quantized"):
        merge(run, tmp_path / "out", base=tmp_path / "base", dtype=torch.float16)


@pytest.mark.parametrize("reader", ["peft_lora", "gated"])
def test_kasa_is_refused(tmp_path: Path, reader: str) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    run = make(tmp_path / "base", tmp_path / "run", target_modules=["k_proj"])
    config = json.loads((run / "adapter_config.json").read_text())
    told = {**config, "kasa_config": {"beta": 1e-4}}
    (run / "adapter_config.json").write_text(json.dumps(told))
    if reader == "gated":
        saved = load_file(run / "adapter_model.safetensors")
        gates = {
            n.replace("A.weight", "diag"): t[:, 0].clone() for n, t in saved.items() if "_A" in n
        }
        save_file({**saved, **gates}, run / "adapter_model.safetensors")
    with pytest.raises(DoraExportError, match="kasa_config"):
        read_run(run)


def test_the_first_pattern_that_fits_counts(tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.0.q_proj": 2, "q_proj": 3}}
    scaling = Scaling(config, tmp_path, ReadOptions())
    names = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.v_proj")
    assert [scaling.rank(name) for name in names] == [2, 3, 4]
    assert [scaling.of(name, rank) for name, rank in zip(names, (2, 3, 4), strict=True)] == [
        *(8 / 2, 8 / 3, 8 / 4),
    ]


@pytest.mark.parametrize(
    ("config", "left", "lost"),
    [
        ({"modules_to_save": ["lm_head"]}, ["lm_head"], []),
        ({"modules_to_save": ["lm_head"]}, [], ["lm_head"]),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, ["lm_head"], ["embed_tokens"]),
        ({"modules_to_save": ["lm_head", "score", "classifier"]}, ["lm_head"], []),
        ({"trainable_token_indices": [3, 5]}, ["trainable_tokens"], []),
        ({"trainable_token_indices": [3, 5]}, [], ["trainable_token_indices"]),
    ],
)
def test_what_the_configuration_promises_is_in_the_file(
    tmp_path: Path, llama_base: Path, config: dict[str, Any], left: list[str], lost: list[str]
) -> None:
    known = {k: v for k, v in config.items() if k != "modules_to_save"}
    whole = ["lm_head"] if "modules_to_save" in config else None
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM", **known
    )
    get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), lora).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if any(w in n for w in ("lora_", *left))}
    assert (len(kept) < len(tensors)) == (not left)
    save_file(kept, file, {"format": "pt"})
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**told, **config}))
    options = ReadOptions(base=llama_base)
    if lost:
        with pytest.raises(DoraExportError, match="the file lacks it") as error:
            read_run(tmp_path, options)
        assert all(name in str(error.value) for name in lost)
    else:
        assert read_run(tmp_path, options).warnings == ()


def test_an_alpha_that_a_converter_did_not_know(llama_base: Path, tmp_path: Path) -> None:
    """verl's merger writes 0, so that the result would be the base."""
    adapter = make(llama_base, tmp_path / "lora", target_modules=["q_proj"])
    merge(read_run(adapter), tmp_path / "truth", base=llama_base)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 0}))
    with pytest.raises(DoraExportError, match="lora_alpha is 0") as error:
        merge(read_run(adapter), tmp_path / "no", base=llama_base)
    assert "pass `lora_alpha`" in str(error.value)
    merge(read_run(adapter, options=ReadOptions(lora_alpha=6)), tmp_path / "out", base=llama_base)
    names = (tmp_path / "out", tmp_path / "truth")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in names)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
