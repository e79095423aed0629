"""What unsloth leaves that PEFT reads otherwise than it was trained: the truth is PEFT's model with
the factors laid, or the weights taken out, as unsloth's own loader does it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from converters.errors import RunError
from converters.files.json_files import read_json
from converters.lint import lint
from converters.model.base import open_base
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from dora_serve.proof.verify import logits
from tests.conftest import randomize
from tests.converters.families import DECODER, EXPERTS, same, save_adapter

ROWS = torch.arange(3, 23).reshape(2, 10)
IDS = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}
GATE, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
GROUPED = {"lora_B_layout": "grouped_by_expert"}
UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}


def by_parameter(gate: str, down: str) -> dict[str, object]:
    each = {"gate_up_proj": {"lora_B_layout": gate}, "down_proj": {"lora_B_layout": down}}
    return {"unsloth_fused_expert_lora": {"parameters": each}}


def base_and_lora(
    tmp_path: Path, cls: Any = Qwen3MoeForCausalLM, config: Any = Qwen3MoeConfig
) -> tuple[Path, Path, torch.Tensor]:
    base, lora = tmp_path / "base", tmp_path / "lora"
    sizes = {**DECODER, **EXPERTS, "head_dim": 8, "hidden_size": 32, "moe_intermediate_size": 24}
    model = cls(config(**sizes))
    randomize(model, ("experts",))
    model.save_pretrained(base)
    save_adapter(cls, base, lora, target_modules=["q_proj"], target_parameters=[GATE, DOWN])
    live = PeftModel.from_pretrained(cls.from_pretrained(base), str(lora)).eval()
    return base, lora, logits(live, IDS)


def lay(folder: Path, said: Mapping[str, object], *wrappers: str) -> None:
    """Put `lora_B`, `[out, r, experts]`, of these wrappers expert by expert, and say so."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(tuple(f"{w}.lora_B.weight" for w in wrappers))]:
        b = tensors[name]
        tensors[name] = b.reshape(b.shape[0], -1, 4).transpose(1, 2).reshape(b.shape).contiguous()
    save_file(tensors, file)
    config.write_text(json.dumps({**read_json(config), **said}))


# PEFT wraps the parameters one in the other: gate_up_proj is the inner one here.
BOTH, INNER = ("experts", "experts.base_layer"), ("experts.base_layer",)


@pytest.mark.parametrize(
    ("said", "wrappers"),
    [
        pytest.param(GROUPED, BOTH, id="said"),
        pytest.param({"auto_mapping": GROUPED}, BOTH, id="said-in-auto-mapping"),
        pytest.param(by_parameter("grouped_by_expert", "rank_major"), INNER, id="one-of-both"),
        pytest.param({**UNSLOTH, "lora_B_layout": "rank_major"}, (), id="said-as-peft"),
        pytest.param(UNSLOTH, BOTH, id="older"),
    ],
)
def test_experts_are_read_as_unsloths_loader_reads_them(
    tmp_path: Path, said: Mapping[str, object], wrappers: tuple[str, ...]
) -> None:
    base, lora, truth = base_and_lora(tmp_path)
    lay(lora, said, *wrappers)
    run = read_run(lora, ReadOptions(base=base))
    assert any("UNSLOTH_MOE_LORA_MERGED" in w for w in run.warnings) == (said == UNSLOTH)
    merge(run, tmp_path / "merged", base=base)
    same(logits(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "merged").eval(), IDS), truth)
    assert verify(run, tmp_path / "merged", base=base).passed
    write_adapter(run, tmp_path / "adapter", base=base)
    plain = Qwen3MoeForCausalLM.from_pretrained(base)
    same(logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval(), IDS), truth)
    checks = {f.check for f in lint(lora, open_base(base)) if f.severity != "info"}
    assert ("lora_B_layout" in checks) == bool(wrappers)
    assert "lora_B_layout" not in {f.check for f in lint(tmp_path / "adapter", open_base(base))}


def test_a_family_that_unsloth_left_to_peft(tmp_path: Path) -> None:
    base, lora, truth = base_and_lora(tmp_path, OlmoeForCausalLM, OlmoeConfig)
    lay(lora, UNSLOTH)
    run = read_run(lora, ReadOptions(base=base))
    assert run.warnings == ()
    merge(run, tmp_path / "merged", base=base)
    same(logits(OlmoeForCausalLM.from_pretrained(tmp_path / "merged").eval(), IDS), truth)


def test_without_the_base_an_older_run_is_not_guessed(tmp_path: Path) -> None:
    _, lora, _ = base_and_lora(tmp_path)
    lay(lora, UNSLOTH)
    with pytest.raises(RunError, match="cannot be read without the base"):
        read_run(lora)
    lay(lora, {"lora_B_layout": "rank_major"})
    assert read_run(lora).updates


def test_pissa_that_began_otherwise_than_peft_repeats(tmp_path: Path, llama_base: Path) -> None:
    lora = tmp_path / "lora"
    save_adapter(LlamaForCausalLM, llama_base, lora, init_lora_weights="pissa")
    weights = lora / "adapter_model.safetensors"
    said = {"pissa": "unsloth_randomized_svd", "sha256": "of another adapter, saved here before"}
    (lora / "unsloth_lora_init.json").write_text(json.dumps(said))
    assert read_run(lora, ReadOptions(base=llama_base)).updates
    said["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (lora / "unsloth_lora_init.json").write_text(json.dumps(said))
    with pytest.raises(RunError, match="a singular value decomposition of its own"):
        read_run(lora, ReadOptions(base=llama_base))
    assert [f.severity for f in lint(lora, open_base(llama_base)) if f.check == "init"] == ["error"]
