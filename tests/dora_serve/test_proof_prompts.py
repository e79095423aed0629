"""What the proof asks: tokens that were trained alone, the base's own words, the last position."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import TargetError
from converters.model.base import open_base
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify
from dora_serve.proof.prompts import prompts_of
from tests.conftest import MODELS, tiny_llama
from tests.converters.families import save_adapter, save_base
from tests.converters.test_peft_kinds import saved, trained
from tests.converters.tied_families import ENCODER, EYES

VOCAB, TOKENS = 900, [411, 655, 890]
SAMPLE = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"
LORA = {"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def tokens_alone(model: Any) -> Any:
    return get_peft_model(model, TrainableTokensConfig(token_indices=TOKENS))


def tokens_beside(model: Any) -> Any:
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}
    return get_peft_model(model, LoraConfig(**LORA, **tokens))


def low_rank(model: Any) -> Any:
    peft = get_peft_model(model, LoraConfig(**LORA, target_modules=["embed_tokens"]))
    trained = peft.base_model.model.model.embed_tokens.lora_embedding_A["default"]
    trained.requires_grad_(False)[:, TOKENS] = 0.3
    return peft


def whole(model: Any) -> Any:
    said = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    peft = get_peft_model(model, LoraConfig(**LORA, **said))
    saved = peft.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    saved.requires_grad_(False)[TOKENS] += 0.3
    return peft


def new_tokens(model: Any) -> Any:
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(**LORA, target_modules=["q_proj"]))
    embedding = peft.get_input_embeddings().weight
    embedding.requires_grad_(False)[VOCAB:] = 0.3
    return peft


KINDS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "TrainableTokens": (tokens_alone, TOKENS),
    "tokens of LoRA": (tokens_beside, TOKENS),
    "LoRA of an embedding": (low_rank, TOKENS),
    "a whole embedding": (whole, TOKENS),
    "new tokens": (new_tokens, [VOCAB, VOCAB + 1, VOCAB + 2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_were_trained_alone_are_asked(tmp_path: Path, kind: str) -> None:
    train, tokens = KINDS[kind]
    tiny_llama(vocab_size=VOCAB).save_pretrained(tmp_path / "base")
    peft = train(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name or "embedding_B" in name or "tokens_delta" in name:
                parameter += 0.1
    peft.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=tmp_path / "base"))
    asked = prompts_of(run, open_base(tmp_path / "base"))
    assert f"{len(tokens)} trained or new tokens" in asked.asked
    ids = torch.cat([batch["input_ids"].flatten() for batch in asked.batches])
    assert set(tokens) <= set(ids.tolist())
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    right = verify(run, tmp_path / "merged", tmp_path / "base")
    assert right.passed and right.has_update and right.control > 10 * right.tolerance
    file = tmp_path / "merged/model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][tokens[-1]] = 0.0  # one of them lost
    save_file(tensors, file, {"format": "pt"})
    wrong = verify(run, tmp_path / "merged", tmp_path / "base")
    assert not wrong.passed and wrong.max_abs > 10 * wrong.tolerance


def test_what_no_prompt_asks_is_told(tmp_path: Path) -> None:
    """A row of the embedding that stands in no prompt: the numbers pass, and it is another one than
    was written."""
    tiny_llama(vocab_size=VOCAB).save_pretrained(tmp_path / "base")
    save_adapter(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path / "run")
    base, run = open_base(tmp_path / "base"), read_run(tmp_path / "run")
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    right = verify(run, tmp_path / "merged", base)
    assert right.passed and not right.warnings
    ids = torch.cat([batch["input_ids"].flatten() for batch in prompts_of(run, base).batches])
    file = tmp_path / "merged/model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][min({*range(VOCAB)} - {*ids.tolist()})] += 1
    save_file(tensors, file, {"format": "pt"})
    found = verify(run, tmp_path / "merged", base)
    assert found.max_abs == right.max_abs
    assert [said for said in found.warnings if file.name in said and "no longer as" in said]


def test_a_base_that_knows_no_sentence_is_asked_its_own_words() -> None:
    base = MODELS / "tiny-llama-base"
    words = transformers.AutoTokenizer.from_pretrained(base)
    found = prompts_of(read_run(SAMPLE), open_base(base))
    assert found.asked[0] == "5 texts of its tokenizer's words"
    ids = found.batches[0]["input_ids"]
    assert words.unk_token_id not in ids and (ids[:, 0] == words.bos_token_id).all()


@pytest.mark.parametrize("rope", [False, True], ids=["a table", "dynamic"])
def test_the_last_position_is_asked(tmp_path: Path, rope: bool) -> None:
    """A merge that lost the last positions, or forgot that they stretch, is right before them."""
    if rope:
        scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        model: Any = tiny_llama(max_position_embeddings=40, rope_parameters=scaled)
        targets = ["q_proj"]
    else:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=80, n_embd=32, n_layer=1, n_head=2, n_positions=90, pad_token_id=0
        )
        model, targets = transformers.GPT2LMHeadModel(config), ["c_attn"]
    base, out = tmp_path / "base", tmp_path / "merged"
    model.save_pretrained(base)
    said = {**LORA, "target_modules": targets, "fan_in_fan_out": not rope}
    peft = get_peft_model(type(model).from_pretrained(base), LoraConfig(**said))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    peft.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, out, base=base)
    right = verify(run, out, base)
    assert right.passed and f"one of {53 if rope else 86} tokens" in right.asked
    if rope:
        text = (out / "config.json").read_text()
        (out / "config.json").write_text(text.replace('"dynamic"', '"default"'))
    else:
        tensors = load_file(out / "model.safetensors")
        tensors["transformer.wpe.weight"][80:] = 0.0
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert not verify(run, out, base).passed


def test_texts_beside_images(tmp_path: Path) -> None:
    """A class that compares the two takes both; it has no input embedding of its own."""
    text = {**ENCODER, "eos_token_id": 2}
    values = {"text_config": text, "vision_config": EYES, "projection_dim": 32}
    base = saved("CLIPModel", "CLIPConfig", values, tmp_path / "base")
    trained("CLIPModel", base, tmp_path / "run", target_modules=["fc1"], bias="all")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    found = verify(run, tmp_path / "merged", base=base)
    assert found.passed
    assert "random pixel_values beside each" in found.asked
    for tower in ("text_model", "vision_model"):
        tensors = load_file(tmp_path / "merged" / "model.safetensors")
        tensors[f"{tower}.encoder.layers.0.mlp.fc1.weight"] *= 1.1
        (tmp_path / tower).mkdir()
        save_file(tensors, tmp_path / tower / "model.safetensors", {"format": "pt"})
        shutil.copy(tmp_path / "merged" / "config.json", tmp_path / tower)
        assert not verify(run, tmp_path / tower, base=base).passed


@pytest.mark.parametrize("end", [2, 59])
def test_the_end_may_be_the_last_word(end: int, tmp_path: Path) -> None:
    """Of a classifier's text, whose only end is behind it."""
    sizes = {"d_model": 32, "vocab_size": 60, "max_position_embeddings": 64, "eos_token_id": end}
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 40}
    values = {f"{side}_{n}": v for side in ("encoder", "decoder") for n, v in sides.items()}
    values |= {**sizes, "forced_eos_token_id": end, "decoder_start_token_id": end}
    name = "BartForSequenceClassification"
    base = saved(name, "BartConfig", values, tmp_path / "base")
    trained(name, base, tmp_path / "run", target_modules=["q_proj"])
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    assert verify(run, tmp_path / "merged", base=base).passed


def test_a_live_model_that_cannot_compute_is_said(tmp_path: Path) -> None:
    """PEFT trains no OLoRA on a Conv1D that is not square: its factors fit no forward pass."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    cls = save_base("gpt2", base)
    save_adapter(cls, base, lora, target_modules=["c_attn"], init_lora_weights="olora")
    run = read_run(lora, ReadOptions(base=base))
    with pytest.raises(TargetError, match="does not know what to ask") as error:
        verify(run, base, base)
    assert "mat1 and mat2" in str(error.value.found)
