"""Pairs for parameters of fused experts as PEFT before 0.19.1 laid them: for a class that reads
`[experts, out, in]` `lora_A` has the outputs. Where such a parameter is square its shape does not
tell; PEFT of today then computes another model in silence, so the truth is what it makes of the
same update laid as it lays it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from converters.errors import RunError
from converters.files.json_files import read_json
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from dora_serve.proof.verify import logits
from tests.conftest import randomize
from tests.converters.families import DECODER, EXPERTS, same, save_adapter

ROWS = torch.arange(3, 23).reshape(2, 10)
IDS = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}
GATE, BOTH = ["mlp.experts.gate_up_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OLMOE = (OlmoeForCausalLM, OlmoeConfig, {"intermediate_size": 16})  # gate_up_proj is a square
QWEN = (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"moe_intermediate_size": 24})
GPT_OSS = (GptOssForCausalLM, GptOssConfig, {"intermediate_size": 32, "num_local_experts": 4})
OLD = [
    pytest.param(OLMOE, GATE, "0.18.1", True, id="square"),
    pytest.param(OLMOE, BOTH, "0.18.1", True, id="square-beside-another"),
    pytest.param(OLMOE, GATE, "0.19.0", True, id="square-0.19.0"),
    pytest.param(OLMOE, GATE, "0.21.0", False, id="square-today"),
    pytest.param(QWEN, BOTH, None, True, id="no-version"),
    pytest.param(GPT_OSS, BOTH, "0.18.0.dev0", False, id="transposed"),
    pytest.param(GPT_OSS, BOTH[1:], "0.19.0", True, id="transposed-0.19.0"),
]


def turn(folder: Path, version: str | None, turned: bool) -> None:
    """Write the adapter in `folder` as that version of PEFT does: A, `[experts·r, in]`, becomes
    what B was, `[out, r·experts]`, the other way round."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [n for n in tensors if "experts" in n and ".lora_A." in n and turned]:
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = tensors[name], tensors[other]
        experts = 4
        per_a = a.reshape(experts, -1, a.shape[1])  # e r i
        per_b = b.reshape(b.shape[0], -1, experts)  # o r e
        tensors[name] = per_b.permute(2, 1, 0).reshape(-1, b.shape[0]).contiguous()
        tensors[other] = per_a.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = read_json(folder / "adapter_config.json")
    config.pop("peft_version")
    said = {} if version is None else {"peft_version": version}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **said}))


@pytest.mark.parametrize(("family", "parameters", "version", "turned"), OLD)
def test_pairs_of_experts_that_older_peft_laid_the_other_way_round(
    tmp_path: Path, family: Any, parameters: list[str], version: str | None, turned: bool
) -> None:
    cls, config, values = family
    base, lora = tmp_path / "base", tmp_path / "lora"
    model = cls(config(**{**DECODER, **EXPERTS, "head_dim": 8, "hidden_size": 32, **values}))
    randomize(model, ("experts",))
    model.save_pretrained(base)
    save_adapter(cls, base, lora, target_modules=["q_proj"], target_parameters=parameters)
    live = PeftModel.from_pretrained(cls.from_pretrained(base), str(lora)).eval()
    truth = logits(live, IDS)
    turn(lora, version, turned)

    run = read_run(lora, ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    same(logits(cls.from_pretrained(tmp_path / "merged").eval(), IDS), truth)
    write_adapter(run, tmp_path / "adapter", base=base)
    again = PeftModel.from_pretrained(cls.from_pretrained(base), str(tmp_path / "adapter")).eval()
    same(logits(again, IDS), truth)
    if cls is OlmoeForCausalLM:  # whose merge PEFT of today would not call the same
        assert verify(run, tmp_path / "merged", base=base).passed


def test_without_the_base_a_square_of_older_peft_is_not_guessed(tmp_path: Path) -> None:
    cls, config, values = OLMOE
    model = cls(config(**{**DECODER, **EXPERTS, "hidden_size": 32, **values}))
    model.save_pretrained(tmp_path / "base")
    lora = tmp_path / "lora"
    save_adapter(cls, tmp_path / "base", lora, target_modules=[], target_parameters=GATE)
    assert read_run(lora).updates
    turn(lora, "0.18.1", turned=True)
    with pytest.raises(RunError, match="cannot be read without the base"):
        read_run(lora)


def test_experts_at_another_rank_than_the_configuration_says(tmp_path: Path) -> None:
    """NeMo AutoModel divides it by how many experts are asked at a time, and does not say so: the
    rows are then half as many experts at the rank that it says."""
    cls, config, values = QWEN
    base, lora = tmp_path / "base", tmp_path / "lora"
    model = cls(config(**{**DECODER, **EXPERTS, "head_dim": 8, "hidden_size": 32, **values}))
    randomize(model, ("experts",))
    model.save_pretrained(base)
    pattern = {".*experts.*": 2}
    options = {"r": 4, "target_parameters": BOTH, "rank_pattern": pattern}
    save_adapter(cls, base, lora, target_modules=["q_proj"], **options)
    assert read_run(lora, ReadOptions(base=base)).updates
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**read_json(file), "rank_pattern": {}}))
    with pytest.raises(RunError, match="of all experts at the rank"):
        read_run(lora, ReadOptions(base=base))
