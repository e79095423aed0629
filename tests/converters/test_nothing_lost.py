"""What must not be lost, or changed, without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from converters.compare import compare
from converters.extract import difference
from converters.model.base import open_base
from converters.model.match import changed
from dora_serve import DoraExportError, ReadOptions, merge, read_run, write_adapter
from tests.conftest import randomize, tiny_llama
from tests.reference_layout import state_dict, write_run


def adapter(model: Any, folder: Path, config: Any, words: tuple[str, ...] = ("lora_",)) -> Any:
    """A PEFT adapter of `model` with random values, saved to `folder`."""
    tuned = get_peft_model(model, config)
    randomize(tuned, words)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return tuned.eval()


def test_a_tensor_of_integers_leaves_its_neighbours_alone(
    roberta_base: Path, tmp_path: Path
) -> None:
    model = RobertaForSequenceClassification.from_pretrained(roberta_base, num_labels=3)
    state = state_dict(model, ("query",))
    # Checkpoints of older transformers hold it, bases of newer ones do not.
    state["model.roberta.embeddings.position_ids"] = torch.arange(40).view(1, -1)
    merge(write_run(tmp_path, state), tmp_path / "out", base=roberta_base)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("classifier.dense.bias", "classifier.dense.weight"):
        assert torch.equal(merged[name], state[f"model.{name}"])
    assert torch.equal(merged["roberta.embeddings.position_ids"], torch.arange(40).view(1, -1))


def test_a_new_head_is_not_taken_for_the_embedding(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
        pad_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    model = GPTNeoXForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    lora = LoraConfig(r=2, target_modules=["query_key_value"], task_type="SEQ_CLS")
    tuned = adapter(model, tmp_path / "lora", lora)
    merge(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base")
    merged = GPTNeoXForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(1, 9).view(1, -1)
    with torch.no_grad():
        assert (merged(ids).logits - tuned(ids).logits).abs().max() < 1e-4


def test_changes_finer_than_the_base_are_changes(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base")

    def float32() -> Any:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    adapter(float32(), tmp_path / "same", lora)
    assert changed(read_run(tmp_path / "same"), base) == {}

    model = float32()
    with torch.no_grad():
        model.model.norm.weight.add_(1e-3)  # a quarter of what bfloat16 tells apart at 1
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.0005)
    model.save_pretrained(tmp_path / "tuned")
    found = difference(open_base(tmp_path / "tuned"), base)
    assert list(found.updates) == ["model.layers.0.self_attn.q_proj"]
    assert list(found.replaced) == ["model.norm.weight"]

    adapter(model, tmp_path / "finer", lora)
    assert list(changed(read_run(tmp_path / "finer"), base)) == ["model.norm.weight"]


def test_both_sides_of_a_tied_pair_are_compared(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    adapter(model, tmp_path / "lora", lora)
    run, base = read_run(tmp_path / "lora"), open_base(tmp_path / "base")
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    assert compare(run, run, base, base).modules.keys() == names


def test_an_update_of_nothing_is_fitted_without_nan(llama_base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    loha = LoHaConfig(r=2, target_modules=["q_proj"])  # fresh, so ΔW is zero
    adapter(model, tmp_path / "loha", loha, words=())
    run = read_run(tmp_path / "loha", ReadOptions(base=llama_base))
    write_adapter(run, tmp_path / "out", base=llama_base, max_rank=3)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors
    assert not any(tensor.any() or tensor.isnan().any() for tensor in tensors.values())


def test_a_causal_adapter_on_a_model_that_sees_images(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=28,
        patch_size=14,
        projection_dim=32,
    )
    config = LlavaConfig(
        text_config=tiny_llama().config.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=79,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=r".*language.*q_proj", task_type="CAUSAL_LM")
    tuned = adapter(model, tmp_path / "lora", lora)
    merge(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(1, 9).view(1, -1)
    with torch.no_grad():
        live = tuned(input_ids=ids).logits
        assert (merged(input_ids=ids).logits - live).abs().max() < 1e-4
        with tuned.disable_adapter():
            assert (tuned(input_ids=ids).logits - live).abs().max() > 1e-3


def test_an_untied_head_keeps_the_scale_of_t5(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=80,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    old = json.loads(path.read_text())
    del old["scale_decoder_outputs"], old["tie_word_embeddings"]  # as in T5's own folders
    path.write_text(json.dumps(old))
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="SEQ_2_SEQ_LM")
    tuned = adapter(model, tmp_path / "lora", lora)
    merge(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base")
    merged = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(1, 9).view(1, -1)
    with torch.no_grad():
        live = tuned(input_ids=ids, decoder_input_ids=ids).logits
        assert (merged(input_ids=ids, decoder_input_ids=ids).logits - live).abs().max() < 1e-4


def test_an_embedding_that_nothing_is_tied_to_is_merged(roberta_base: Path, tmp_path: Path) -> None:
    model = RobertaForSequenceClassification.from_pretrained(roberta_base, num_labels=3)
    lora = LoraConfig(r=2, target_modules=["word_embeddings"], task_type="SEQ_CLS")
    tuned = adapter(model, tmp_path / "lora", lora)
    merge(tmp_path / "lora", tmp_path / "out", base=roberta_base)
    merged = RobertaForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(2, 9).view(1, -1)
    with torch.no_grad():
        live = tuned(ids).logits
        assert (merged(ids).logits - live).abs().max() < 1e-4
        with tuned.disable_adapter():
            assert (tuned(ids).logits - live).abs().max() > 1e-3


def test_an_update_beyond_float16_is_refused(llama_base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    adapter(model, tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"]))
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: tensor * 1e7 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(DoraExportError, match="float16"):
        write_adapter(tmp_path / "lora", tmp_path / "out", base=llama_base, dtype=torch.float16)
