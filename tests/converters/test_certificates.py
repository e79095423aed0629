"""What a certificate says was replaced: all of it, by the names that its modules have too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dora_serve import DoraExportError, ReadOptions, merge, read_run, write_adapter
from tests.conftest import randomize

ALPHA: dict[Any, str] = {LoraConfig: "lora_alpha", LoHaConfig: "alpha"}


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["as saved", "without its prefix"])
def test_what_was_replaced_is_named_as_in_the_run(tmp_path: Path, prefix: str) -> None:
    """Hub checkpoints of GPT-2 hold `h.0.ln_1.weight`, the class says `transformer.h.0…`."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=80, n_positions=40)
    GPT2LMHeadModel(config).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(named, base / "model.safetensors", {"format": "pt"})
    lora = LoraConfig(
        r=3,
        target_modules=["c_attn"],
        modules_to_save=["ln_1"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), lora)
    randomize(model, ("lora_", "modules_to_save"))
    model.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    for write in (merge, write_adapter):
        write(run, tmp_path / "out", base=base, force=True)
        proof = json.loads((tmp_path / "out" / "dora_export.json").read_text())
        ends = ["ln_1.bias", "ln_1.weight"]
        assert proof["replaced"] == [f"transformer.h.0.{end}" for end in ends]
        assert list(proof["modules"]) == ["transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize("changed", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("kind", "write"), [(LoraConfig, merge), (LoraConfig, write_adapter), (LoHaConfig, merge)]
)
def test_a_certificate_tells_no_file_that_was_not_read(
    tmp_path: Path, llama_base: Path, kind: Any, write: Any, changed: str
) -> None:
    """A training may save its next checkpoint while the last is merged. Of LoHa, PEFT reads the
    numbers at once; a configuration is read at once of every run."""
    for name, number in (("run", 0), ("next", 1)):
        torch.manual_seed(number)
        settings = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        config = kind(**settings, **{ALPHA[kind]: 4 + 4 * number})
        model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
        randomize(model, ("lora_", "hada_"))
        model.save_pretrained(tmp_path / name)
    run = read_run(tmp_path / "run", ReadOptions(base=llama_base))
    (tmp_path / "next" / changed).replace(tmp_path / "run" / changed)
    with pytest.raises(DoraExportError, match="changed while it was read"):
        write(run, tmp_path / "out", base=llama_base)
    assert not (tmp_path / "out").exists()
    merge(
        read_run(tmp_path / "run", ReadOptions(base=llama_base)), tmp_path / "out", base=llama_base
    )
