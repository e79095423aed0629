"""What a run holds whole, or adapts, where the base's files have it under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from converters.errors import BaseError
from converters.model.base import open_base
from converters.model.layout import Layout
from converters.model.match import changed
from dora_serve import diff, extract, merge, read_run
from tests.conftest import randomize
from tests.converters.families import DECODER, ENCODER, prove, same
from tests.converters.made import WEIGHTS

V4 = {
    **DECODER,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "head_dim": 8,
    "qk_rope_head_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPREAD = {"initializer_range": 0.3}  # so that a bias is seen in the logits
MIXTRAL = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    # Class → its configuration, and a tensor that only its files have.
    "MixtralForCausalLM": (MIXTRAL, "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    "GteForMaskedLM": ({**ENCODER, **SPREAD}, "gte.encoder.layer.0.attention.qkv_proj.bias"),
    "DeepseekV4ForCausalLM": (V4, "head.weight"),
    "MllamaForCausalLM": (
        {**DECODER, "num_hidden_layers": 1, "cross_attention_layers": []},
        "model.embed_tokens.weight",
    ),
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    cls, (values, own) = getattr(transformers, name), FAMILIES[name]
    torch.manual_seed(0)
    cls(cls.config_class(**values)).to(dtype).save_pretrained(folder)
    assert own in load_file(folder / WEIGHTS)
    return cls


def trained(cls: Any, base: Path, out: Path, **config: Any) -> None:
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **config})
    model = get_peft_model(cls.from_pretrained(base), lora)
    randomize(model, ("lora_", "modules_to_save", "proj.base_layer.bias"))
    model.save_pretrained(out)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MixtralForCausalLM", {"modules_to_save": ["experts"]}),
        ("GteForMaskedLM", {"bias": "lora_only", "modules_to_save": ["v_proj"]}),
        ("DeepseekV4ForCausalLM", {"target_modules": ["lm_head"]}),
        ("MllamaForCausalLM", {"modules_to_save": ["embed_tokens"]}),
    ],
)
def test_the_merge_is_the_live_model(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    cls = saved(name, base)
    trained(cls, base, lora, **config)
    prove(cls, base, lora, tmp_path)
    held = [load_file(folder / WEIGHTS) for folder in (base, tmp_path / "merged")]
    assert held[0].keys() == held[1].keys()
    assert cls.config_class.from_pretrained(tmp_path / "merged").vocab_size == 80


def test_a_head_under_another_name_is_not_the_embedding(tmp_path: Path) -> None:
    base, lora, merged = (tmp_path / name for name in ("base", "lora", "merged"))
    cls = saved("DeepseekV4ForCausalLM", base)
    trained(cls, base, lora, target_modules=["lm_head"])
    run = read_run(lora)
    merge(run, merged, base=base)
    assert changed(run, open_base(base)) == {}  # the head that PEFT saves along is the base's
    extract(merged, tmp_path / "out", base=base, energy=1.0)
    for folder in (merged, tmp_path / "out"):
        found = diff(lora, folder, base=base)
        assert found.total.relative is not None
        assert found.total.relative < 1e-6
        assert found.whole == {}


def test_experts_for_another_task(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    saved("MixtralForCausalLM", base)
    cls = transformers.MixtralForSequenceClassification
    trained(cls, base, lora, modules_to_save=["score", "experts"], task_type="SEQ_CLS")
    merge(read_run(lora), tmp_path / "out", base=base)
    merged, told = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    live = PeftModel.from_pretrained(cls.from_pretrained(base), str(lora)).eval()
    ids = torch.arange(5, 17).view(2, 6)
    same(merged.eval()(ids).logits, live(ids).logits)


def test_a_part_in_a_wider_dtype_than_its_neighbours(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    cls = saved("GteForMaskedLM", base, torch.bfloat16)
    trained(cls, base, lora, modules_to_save=["v_proj"])
    whole = load_file(lora / "adapter_model.safetensors")
    merge(read_run(lora), tmp_path / "out", base=base)
    old, new = (load_file(folder / WEIGHTS) for folder in (base, tmp_path / "out"))
    name, rows = "gte.encoder.layer.0.attention.qkv_proj.weight", 32
    value = whole["base_model.model.gte.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(new[name][2 * rows :].to(value.dtype), value)
    assert torch.equal(new[name][rows : 2 * rows].bfloat16(), old[name][rows : 2 * rows])
    assert not torch.equal(new[name][:rows].bfloat16(), old[name][:rows])  # q_proj's update


def test_what_saving_makes_no_tensor_of_the_base_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    trained(saved("MixtralForCausalLM", base), base, lora, modules_to_save=["experts"])
    monkeypatch.setattr(Layout, "_converted", lambda _, group, tensors: {group.key: tensors})
    monkeypatch.setattr(
        "transformers.core_model_loading.revert_weight_conversion", lambda _, _state: {}
    )
    with pytest.raises(BaseError, match="converts this tensor on loading"):
        merge(read_run(lora), tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
