"""Heads that an engine drops: Gemma 1 and 2 as llama.cpp's own script converts them, where the
logits of such a merge were others by more than the largest; Cohere as vLLM loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from dora_serve import merge
from tests.conftest import randomize
from tests.converters.families import DECODER


@pytest.mark.parametrize(
    ("family", "trained", "engine"),
    [
        ("Gemma2", "lm_head", "llama.cpp"),
        ("Cohere", "embed_tokens", "vLLM"),
        ("Gemma2", None, None),
        ("Qwen2", "lm_head", None),
    ],
)
def test_a_head_that_an_engine_leaves_out_is_told(
    tmp_path: Path, family: str, trained: str | None, engine: str | None
) -> None:
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(kind.config_class(**DECODER, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    saved = None if trained is None else [trained]
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    randomize(peft, ("lora_", "modules_to_save"))
    peft.save_pretrained(tmp_path / "lora")
    warnings = merge(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base").warnings
    told = [said for said in warnings if "has no head" in said]
    assert len(told) == (engine is not None)
    assert all(str(engine) in said for said in told)
