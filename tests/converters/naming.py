"""Tiny models, adapters on them, and the forms of names in which runs and other tools store one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.lint import lint
from converters.model.base import open_base
from converters.targets.lora_folder import CONFIG, WEIGHTS
from tests.conftest import randomize
from tests.converters.families import DECODER, ENCODER, EXPERTS
from tests.converters.families import FAMILIES as SHAPES

PREFIX = "base_model.model."
BOUND = 1e-4
BOTH = frozenset({"peft", "transformers"})
INPUTS = {"input_ids": torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))}
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
TEXT = {**DECODER, "head_dim": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN3_VISION = {
    **QWEN_VISION,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
TOKENS = {
    "image_token_id": 70,
    "video_token_id": 71,
    "vision_start_token_id": 72,
    "vision_end_token_id": 73,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}


@dataclass(frozen=True)
class Family:
    """`saved`: the class of the base on disk. `trained`: the class that the run was trained in, and
    that a user loads to apply it. `task`: what the run says of it."""

    saved: str
    config: Callable[[], Any]
    trained: str
    task: str | None = "CAUSAL_LM"
    targets: str | tuple[str, ...] = ("q_proj", "v_proj", "down_proj")


def _llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER),
        vision_config=transformers.CLIPVisionConfig(
            **VISION, num_hidden_layers=2, image_size=16, patch_size=4
        ),
        image_token_index=70,
    )


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={**VISION, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=70,
        boi_token_index=71,
        eoi_token_index=72,
    )


def _qwen2_vl() -> Any:
    return transformers.Qwen2VLConfig(
        text_config={**DECODER, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2},
        **TOKENS,
    )


def _qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_scaling": ROPE},
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        **TOKENS,
    )


def _qwen3_5() -> Any:
    rope = {**ROPE, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    return transformers.Qwen3_5Config(
        text_config={
            **TEXT,
            **linear,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "full_attention_interval": 2,
            "rope_parameters": {**rope, "mrope_section": [1, 1, 0]},
        },
        vision_config={**QWEN3_VISION, "in_channels": 3},
        **TOKENS,
    )


def _qwen2() -> Any:
    return transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)


def _sees(name: str, config: Callable[[], Any]) -> Family:
    """Its language model is adapted, in the class of the whole."""
    whole = f"{name}ForConditionalGeneration"
    return Family(whole, config, whole, targets=LANGUAGE)


def _translates(name: str, *targets: str) -> Family:
    whole, config = f"{name}ForConditionalGeneration", getattr(transformers, f"{name}Config")
    values = SHAPES[name.lower()][2]
    return Family(whole, lambda: config(**values), whole, task="SEQ_2_SEQ_LM", targets=targets)


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, "Qwen2ForCausalLM"),
    "llama": Family(
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**DECODER),
        "LlamaForCausalLM",
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda: transformers.MistralConfig(**DECODER),
        "MistralForCausalLM",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**TEXT), "Qwen3ForCausalLM"
    ),
    "qwen3-moe": Family(
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(**TEXT, **EXPERTS),
        "Qwen3MoeForCausalLM",
        targets=("q_proj", "v_proj"),
    ),
    "gemma3, decoder": Family(
        "Gemma3ForCausalLM", lambda: transformers.Gemma3TextConfig(**TEXT), "Gemma3ForCausalLM"
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        lambda: transformers.RobertaConfig(**ENCODER),
        "RobertaForSequenceClassification",
        task="SEQ_CLS",
        targets=("query", "value"),
    ),
    "qwen2, base of AutoModel": Family("Qwen2Model", _qwen2, "Qwen2ForCausalLM"),
    "qwen2, embedding": Family("Qwen2ForCausalLM", _qwen2, "Qwen2Model", task="FEATURE_EXTRACTION"),
    "gpt2": Family(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80),
        "GPT2LMHeadModel",
        targets=("c_attn", "mlp.c_proj"),
    ),
    "bert": Family(
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(**ENCODER),
        "BertForSequenceClassification",
        task="SEQ_CLS",
        targets=("query", "value"),
    ),
    "roberta, masked": Family(
        "RobertaForMaskedLM",
        lambda: transformers.RobertaConfig(**ENCODER),
        "RobertaForMaskedLM",
        task=None,
        targets=("query", "value"),
    ),
    "bart": _translates("Bart", "q_proj", "v_proj", "fc1"),
    "t5": _translates("T5", "q", "v", "wo"),
    "llava": _sees("Llava", _llava),
    "gemma3": _sees("Gemma3", _gemma3),
    "qwen2-vl": _sees("Qwen2VL", _qwen2_vl),
    "qwen3-vl": _sees("Qwen3VL", _qwen3_vl),
    "qwen3.5": _sees("Qwen3_5", _qwen3_5),
    "qwen3.5, text": Family("Qwen3_5ForConditionalGeneration", _qwen3_5, "Qwen3_5ForCausalLM"),
}


def _blocks(segment: str) -> Callable[[str], str]:
    return lambda key: re.sub(r"((?:layers|layer|h|blocks)\.\d+)\.", rf"\1.{segment}.", key)


def _transformers4(key: str) -> str:
    inner = key.removeprefix(PREFIX)
    for new, old in (("model.language_model.", "language_model.model."), ("model.", "")):
        if inner.startswith(new):
            return PREFIX + inner.replace(new, old, 1)
    return key


def _qwen2_vl_4(key: str) -> str:
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


# Form → what it makes of a key that PEFT saves.
WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile, outside": lambda key: "_orig_mod." + key,
    "torch.compile": lambda key: key.replace(PREFIX, PREFIX + "_orig_mod.", 1),
    "torch.compile, per block": _blocks("_orig_mod"),
    "FSDP": _blocks("_fsdp_wrapped_module"),
    "FSDP, outside": lambda key: "_fsdp_wrapped_module." + key,
    "checkpointing": _blocks("_checkpoint_wrapped_module"),
    "DDP": lambda key: "module." + key,
    "DDP, inside": lambda key: key.replace(PREFIX, PREFIX + "module.", 1),
    "PEFT's prefix twice": lambda key: PREFIX + key,
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "the adapter's name": lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.", key),
}
OTHERS: dict[str, Callable[[str], str]] = {
    "AutoModel": lambda key: re.sub(rf"^{PREFIX}(model|transformer|bert|roberta)\.", PREFIX, key),
    "transformers 4": _transformers4,
    "transformers 4, qwen2-vl": _qwen2_vl_4,
    "DeepSpeed": lambda key: f"_forward_module.{key}",
    "Lightning": lambda key: f"model.{key}",
    "body twice": lambda key: key.replace(PREFIX, PREFIX + "model.", 1),
    "sentence-transformers": lambda key: key.replace(PREFIX, PREFIX + "0.auto_model.", 1),
}


def stranger(key: str) -> str:
    """Under a root that no class and no version has."""
    inner = key.removeprefix(PREFIX)
    body = re.sub(r"^(model[.]language_model|model|transformer|bert)[.]", "", inner)
    return f"{PREFIX}whatever.{body}"


def make(folder: Path, family: Family, **changes: Any) -> None:
    """A random base and an adapter on it, as PEFT saves it: `folder`/base and `folder`/lora."""
    torch.manual_seed(0)
    config = family.config()
    config.update(changes)
    model = getattr(transformers, family.saved)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    model.save_pretrained(folder / "base")
    targets = list(family.targets) if isinstance(family.targets, tuple) else family.targets
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=family.task)
    peft = get_peft_model(load(family, folder / "base"), lora)
    randomize(peft, ("lora_", "modules_to_save"))
    peft.save_pretrained(folder / "lora")


def load(family: Family, folder: Path) -> Any:
    """The base in `folder`, in the class that the run was trained in."""
    return getattr(transformers, family.trained).from_pretrained(folder).eval()


def renamed(lora: Path, out: Path, form: Callable[[str], str], every: bool = False) -> Path:
    """A copy of an adapter with other names of its factors, or of `every` tensor."""
    out.mkdir()
    shutil.copy(lora / CONFIG, out)
    tensors = load_file(lora / WEIGHTS)
    new = {form(key) if "lora_" in key or every else key: t for key, t in tensors.items()}
    save_file(new, out / WEIGHTS)
    return out


def logits(model: Any) -> torch.Tensor:
    inputs = dict(INPUTS)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = INPUTS["input_ids"][:, :5]
    with torch.inference_mode():
        found = model.eval()(**inputs)
    values = found.logits if "logits" in found else found.last_hidden_state
    return torch.as_tensor(values.float())


def in_peft(family: str, base: Path, lora: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(FAMILIES[family], base), str(lora)))


def computed(engine: str, family: str, base: Path, lora: Path, truth: torch.Tensor) -> bool:
    """Whether `engine` computes what is the truth."""
    return computes(engine, load(FAMILIES[family], base), lora, truth)


def computes(engine: str, model: Any, lora: Path, truth: torch.Tensor) -> bool:
    """The same of the adapter on `model`, which is used up."""
    try:
        if engine == "peft":
            found = logits(PeftModel.from_pretrained(model, str(lora)))
        else:
            model.load_adapter(str(lora))
            found = logits(model)
    except (AttributeError, KeyError, ValueError, RuntimeError, TypeError):
        return False
    return float((found - truth).abs().max()) <= BOUND


def errors(lora: Path, base: Path, engine: str) -> list[str]:
    found = lint(lora, open_base(base), [engine])
    return [finding.check for finding in found if finding.severity == "error"]
