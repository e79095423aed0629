"""Text runs on quantized models that see images: what PEFT computes on the dequantized model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from tests.conftest import randomize
from tests.converters.made import WEIGHTS
from tests.converters.merged.test_quantized_fp8 import FP8, pack
from tests.converters.merged.test_quantized_ints import gptq_base
from tests.converters.quantized import packed_base

pytest.importorskip("bitsandbytes")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    **TOKENS,
}
EYES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"intermediate_size": 128, "hidden_size": 64, "depth": 1, "num_heads": 4}
TURNED = {"rope_scaling": {"mrope_section": [2, 3, 3]}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": TEXT,
            "vision_config": EYES,
            "mm_tokens_per_image": 4,
            "image_token_index": 75,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**EYES, "model_type": "clip_vision_model", "projection_dim": 64},
            "image_token_index": 79,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**EYES, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 79,
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**TEXT, **TURNED},
            "vision_config": {**QWEN, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
            "image_token_id": 75,
        },
    ),
    "qwen3-vl": (
        "Qwen3VL",
        {
            "text_config": {**TEXT, **TURNED},
            "vision_config": {**QWEN, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
            "image_token_id": 75,
        },
    ),
}
TOWERS = ["vision_tower", "visual", "multi_modal_projector", "lm_head"]
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def bitsandbytes(plain: Path, folder: Path, cls: Any, **config: Any) -> Path:
    said = transformers.BitsAndBytesConfig(**FOUR, **config)
    cls.from_pretrained(plain, quantization_config=said, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    return folder


def blocks(plain: Path, folder: Path, _cls: Any) -> Path:
    said = {**FP8, "weight_block_size": [32, 64]}
    return packed_base(plain, folder, pack(plain, 32, 64), said)


def gptq(plain: Path, folder: Path, _cls: Any) -> Path:
    """Its library needs a GPU: the truth is the formula in float64, as a base of its own."""
    _, truth = gptq_base(plain, folder, "4 bits, act order")
    floats = shutil.copytree(plain, folder.with_name("floats"))
    save_file({n: t.contiguous() for n, t in truth.items()}, floats / WEIGHTS, {"format": "pt"})
    return folder


KINDS: dict[str, Callable[[Path, Path, Any], Path]] = {
    "nf4": bitsandbytes,
    "nf4 but the towers": lambda *told: bitsandbytes(*told, llm_int8_skip_modules=TOWERS),
    "fp8, blocks": blocks,
    "gptq, act order": gptq,
}


def live_model(base: Path, cls: Any) -> Any:
    """The model of transformers in float32, dequantized by the library of the format."""
    floats = base.with_name("floats")
    model = cls.from_pretrained(floats if floats.exists() else base, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        model.dequantize(torch.float32)
    return model.float()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 70, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=ids, attention_mask=torch.ones_like(ids)
        ).logits
    return found


# One kind of each model always.
ALWAYS = {
    ("gemma3", "nf4"),
    ("llava", "fp8, blocks"),
    ("mistral3", "gptq, act order"),
    ("qwen2.5-vl", "nf4 but the towers"),
}
CASES = [
    pytest.param(name, kind, marks=[] if (name, kind) in ALWAYS else [pytest.mark.further])
    for name in MODELS
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_was_trained(name: str, kind: str, tmp_path: Path) -> None:
    prefix, values = MODELS[name]
    cls = getattr(transformers, f"{prefix}ForConditionalGeneration")
    torch.manual_seed(0)
    plain, base, run = (tmp_path / part for part in ("plain", "base", "run"))
    cls(cls.config_class(**values)).to(torch.bfloat16).save_pretrained(plain)
    KINDS[kind](plain, base, cls)
    lora = LoraConfig(
        r=4, target_modules=r".*language_model.*(q_proj|down_proj)", task_type="CAUSAL_LM"
    )
    live = get_peft_model(live_model(base, cls), lora)
    randomize(live)
    live.save_pretrained(run)
    truth = logits(live)
    with live.disable_adapter():
        assert float((logits(live) - truth).abs().max()) > 1e-1

    merge(run, tmp_path / "merged", base=base, dtype="float32")
    merged = cls.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert float((logits(merged) - truth).abs().max()) < 2e-6
    stored = {n: t for n, t in merged.state_dict().items() if "vision" in n or "visual" in n}
    frozen = live.get_base_model().state_dict()
    assert stored and all(torch.equal(tensor, frozen[n]) for n, tensor in stored.items())
    read = read_run(run, ReadOptions(base=base))
    assert verify(read, tmp_path / "merged", base).passed
    for target in ("peft", "vllm"):
        write_adapter(run, tmp_path / target, base=base, target=target)
        assert verify(read, tmp_path / target, base, "peft").passed

    if name not in ("gemma3", "qwen2.5-vl"):
        return
    # As one trained it who loaded the text model alone, where transformers has such a class.
    text = shutil.copytree(run, tmp_path / "text")
    file = text / "adapter_model.safetensors"
    tensors = {n.replace(".language_model.", "."): t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    told = json.loads((text / "adapter_config.json").read_text())
    told["target_modules"] = ["q_proj", "down_proj"]
    (text / "adapter_config.json").write_text(json.dumps(told))
    merge(text, tmp_path / "same", base=base, dtype="float32")
    same, own = (load_file(tmp_path / part / WEIGHTS) for part in ("same", "merged"))
    assert same.keys() == own.keys() and all(torch.equal(same[n], own[n]) for n in own)
