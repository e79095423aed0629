"""Tiny random models of every family, adapters on them, and what proves an artifact right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from converters.readers import ReadOptions
from dora_serve import Run, merge, read_run, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import randomize

BOUND = 1e-4

DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 80,
    "pad_token_id": 0,
}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 80,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
PARAMETERS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

# Family → (configuration, head class without the family's name, values, whether both tied and
# untied heads exist).
FAMILIES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "llama": ("Llama", "ForCausalLM", DECODER, True),
    "qwen2": ("Qwen2", "ForCausalLM", DECODER, True),
    "qwen3": ("Qwen3", "ForCausalLM", {**DECODER, "head_dim": 8}, True),
    "mistral": ("Mistral", "ForCausalLM", DECODER, True),
    "gemma": ("Gemma", "ForCausalLM", {**DECODER, "head_dim": 8}, False),
    "gemma2": ("Gemma2", "ForCausalLM", {**DECODER, "head_dim": 8}, False),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", {**DECODER, "head_dim": 8}, False),
    "phi3": ("Phi3", "ForCausalLM", DECODER, True),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 80, "n_positions": 40},
        False,
    ),
    "opt": (
        "OPT",
        "ForCausalLM",
        {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32},
        True,
    ),
    "bert": ("Bert", "ForSequenceClassification", ENCODER, False),
    "roberta": ("Roberta", "ForSequenceClassification", ENCODER, False),
    "deberta-v2": (
        "DebertaV2",
        "ForSequenceClassification",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        False,
    ),
    "distilbert": (
        "DistilBert",
        "ForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 80},
        False,
    ),
    "bart": (
        "Bart",
        "ForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 80,
            "max_position_embeddings": 40,
        },
        False,
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 80},
        True,
    ),
    "vit": (
        "ViT",
        "ForImageClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 8,
        },
        False,
    ),
    "mixtral": (
        "Mixtral",
        "ForCausalLM",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        False,
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        "ForCausalLM",
        {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 16},
        False,
    ),
    "qwen3-moe": ("Qwen3Moe", "ForCausalLM", {**DECODER, **EXPERTS, "head_dim": 8}, False),
}
MOE = {"mixtral", "qwen2-moe", "qwen3-moe"}

# One family of each kind: plain, stored transposed, fused, tied, windows that alternate, experts,
# encoder, encoder-decoder, images. The others have the marker `further`.
KINDS = {"llama", "gpt2", "phi3", "gemma", "gemma3", "mixtral", "bert", "roberta", "t5", "vit"}


def further(family: str) -> tuple[pytest.MarkDecorator, ...]:
    """The mark of a family that only `make test-all` takes."""
    return () if family in KINDS else (pytest.mark.further,)


TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def save_base(family: str, folder: Path, tied: bool | None = None, **changes: Any) -> Any:
    """A random model of the family, saved to `folder`; returns its class."""
    name, head, values, _ = FAMILIES[family]
    extra = {} if tied is None else {"tie_word_embeddings": tied}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**values, **extra, **changes})
    cls = getattr(transformers, head if head.startswith("Gemma3") else name + head)
    cls(config).save_pretrained(folder)
    return cls


def save_adapter(cls: Any, base: Path, out: Path, **config: Any) -> None:
    head = next((TASKS[word] for word in TASKS if cls.__name__.endswith(word)), None)
    lora = LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": head, **config})
    model = get_peft_model(cls.from_pretrained(base), lora)
    randomize(model, ("lora_", "modules_to_save", "trainable_tokens_delta"))
    model.save_pretrained(out)


def prove(cls: Any, base: Path, lora: Path, out: Path, adapter: bool = True) -> Run:
    """Merged model and adapter of the run in `lora` have the logits of PEFT's live model."""
    live = PeftModel.from_pretrained(cls.from_pretrained(base), str(lora)).eval()
    inputs = verification_batch(live)
    truth = logits(live, inputs)
    with live.disable_adapter():
        assert float((logits(live, inputs) - truth).abs().max()) > 1e-2

    run = read_run(lora, ReadOptions(base=base))
    merge(run, out / "merged", base=base)
    merged, info = cls.from_pretrained(out / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(logits(merged.eval(), inputs), truth)
    if adapter:
        write_adapter(run, out / "adapter", base=base)
        again = PeftModel.from_pretrained(cls.from_pretrained(base), str(out / "adapter")).eval()
        same(logits(again, inputs), truth)
    return run


def same(found: torch.Tensor, truth: torch.Tensor) -> None:
    assert float((found - truth).abs().max()) <= BOUND
    assert torch.equal(found.argmax(-1), truth.argmax(-1))
