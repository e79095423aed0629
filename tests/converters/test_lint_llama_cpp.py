"""Modules that llama.cpp's graphs multiply or look up without an adapter that it has loaded.

Measured with llama.cpp of llama-cpp-python 0.3.36, whose own converter made base and adapter: with
each of these it refuses the file, or computes the base.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from converters.errors import TargetError
from converters.lint import lint
from converters.model.base import open_base
from dora_serve import write_adapter
from tests.conftest import randomize
from tests.converters.families import DECODER
from tests.converters.test_gguf import GPT2_SIZES

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "tie_word_embeddings": False,
}
_GEMMA = {"head_dim": 8, "vocab_size_per_layer_input": 80, "hidden_size_per_layer_input": 8}
SIZES = {
    "DeepseekV3": {**DECODER, **_LATENT, "first_k_dense_replace": 2},
    "MiniCPM3": {**DECODER, **_LATENT},
    "Gemma4": {**DECODER, **_GEMMA},
    "GPT2": {**GPT2_SIZES, "tie_word_embeddings": False},
    "OPT": {**DECODER, "word_embed_proj_dim": 32, "ffn_dim": 48},
}


def trained(family: str, module: str, folder: Path) -> tuple[Path, Path]:
    """A tiny base of `family`, and LoRA on `module`."""
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    kind = getattr(transformers, family + head)
    model = kind(kind.config_class(**SIZES[family]))
    model.save_pretrained(folder / "base")
    conv1d = family == "GPT2"
    config = LoraConfig(r=2, target_modules=[module], fan_in_fan_out=conv1d, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    randomize(peft)
    peft.save_pretrained(folder / "lora")
    return folder / "base", folder / "lora"


@pytest.mark.parametrize(
    ("family", "module", "adapted"),
    [
        ("DeepseekV3", "kv_a_proj_with_mqa", False),
        ("DeepseekV3", "lm_head", False),
        ("DeepseekV3", "o_proj", True),
        ("MiniCPM3", "q_b_proj", False),
        ("MiniCPM3", "lm_head", True),
        ("Gemma4", "per_layer_model_projection", False),
        ("Gemma4", "per_layer_projection", True),
        ("GPT2", "wpe", False),
        ("GPT2", "wte", True),
        ("OPT", "fc1", False),  # which it does not convert at all
    ],
)
def test_what_llama_cpp_leaves_out(tmp_path: Path, family: str, module: str, adapted: bool) -> None:
    base, lora = trained(family, module, tmp_path)
    found = lint(lora, open_base(base), ["gguf"])
    errors = {finding.check for finding in found if finding.severity == "error"}
    assert errors == (set() if adapted else {"family"})


def test_positions_are_no_part_of_a_gguf_adapter(tmp_path: Path) -> None:
    base, lora = trained("GPT2", "wpe", tmp_path)
    with pytest.raises(TargetError, match="does not adapt"):
        write_adapter(lora, tmp_path / "out", base=base, target="gguf")
    base, lora = trained("GPT2", "wte", tmp_path / "words")
    write_adapter(lora, tmp_path / "out", base=base, target="gguf")
