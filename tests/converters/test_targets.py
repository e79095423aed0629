"""SGLang and LoRAX: what their loaders make of our folders, compared on logits.

The loaders below compute as the engines do, from `sgl-project/sglang
python/sglang/srt/lora/{lora.py,mem_pool.py}` and `predibase/lorax
server/lorax_server/adapters/lora.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from converters.targets.engines import PROFILES
from dora_serve import DoraExportError, read_run, write_adapter
from dora_serve.commands import adapter as adapter_command
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import randomize

Deltas = dict[str, torch.Tensor]
LAYERS = 2


def stored(folder: Path) -> tuple[dict[str, Any], Deltas]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def sglang(folder: Path) -> Deltas:
    """One A and B buffer per layer and kind, `[:r]` copied, scaled by lora_alpha / r."""
    config, tensors = stored(folder)
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    kinds = {name.split(".")[-1] for name in config["target_modules"]}
    deltas: Deltas = {}
    for layer in range(LAYERS):
        weights = {n: t for n, t in tensors.items() if f"layers.{layer}." in n}
        for name in list(weights):
            if "k_proj" in name or "gate_proj" in name:  # stacked with its neighbours
                others = ("q_proj", "v_proj") if "k_proj" in name else ("up_proj",)
                for other in others:
                    weights[name.replace("k_proj", other).replace("gate_proj", other)]
        for kind in kinds:
            for name, a in weights.items():
                if f".{kind}.lora_A" not in name:
                    continue
                b = weights[name.replace("lora_A", "lora_B")]
                a_buffer, b_buffer = torch.full((rank, a.shape[1]), 7.0), torch.zeros(len(b), rank)
                a_buffer[:rank].copy_(a)
                b_buffer[:, :rank].copy_(b)
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                deltas[module] = scale * b_buffer @ a_buffer
    return deltas


def lorax(folder: Path) -> Deltas:
    """The layers of a kind stacked; a kind that one layer lacks is left out."""
    config, tensors = stored(folder)
    scale = config["lora_alpha"] / config["r"]
    found: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, a in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name):
            kind = re.sub(r"\.\d+\.", ".{}.", match[1])
            number = int(match[1].split(".")[2])
            found.setdefault(kind, {})[number] = (a, tensors[name.replace("lora_A", "lora_B")])
    deltas: Deltas = {}
    for kind, layers in found.items():
        if len(layers) == LAYERS:
            stacked_a = torch.stack([layers[number][0] for number in range(LAYERS)])
            stacked_b = torch.stack([layers[number][1] for number in range(LAYERS)])
            for number in range(LAYERS):
                deltas[kind.format(number)] = scale * stacked_b[number] @ stacked_a[number]
    return deltas


ENGINES: dict[str, Callable[[Path], Deltas]] = {"sglang": sglang, "lorax": lorax}
CASES: dict[str, dict[str, Any]] = {
    "ranks differ": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"up_proj": 3},
    },
    "rslora": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "one layer": {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]},
}


def make(base: Path, out: Path, **config: Any) -> Path:
    lora = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    randomize(model, ("lora_", "modules_to_save", ".bias"))
    model.save_pretrained(out)
    return out


def served(base: Path, deltas: Deltas) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for module, delta in deltas.items():
            model.get_submodule(module).weight += delta
    return model


@pytest.mark.supports(method="peft_lora", family="llama", targets=("sglang", "lorax"))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_engine_of_one_rank_computes_what_peft_computes(
    tmp_path: Path, llama_base: Path, case: str, engine: str
) -> None:
    lora = make(llama_base, tmp_path / "lora", **CASES[case])
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_base), str(lora))
    inputs = verification_batch(live)
    truth = logits(live.eval(), inputs)
    out = tmp_path / "out"
    result = write_adapter(read_run(lora), out, base=llama_base, target=engine)
    deployed = logits(served(llama_base, ENGINES[engine](out)), inputs)
    assert float((deployed - truth).abs().max()) <= 1e-4
    assert torch.equal(deployed.argmax(-1), truth.argmax(-1))
    without = logits(served(llama_base, {}), inputs)
    assert float((without - truth).abs().max()) > 1e-2

    config, tensors = stored(out)
    largest = max(rank for _, rank in result.plan.ranks.values())
    assert config["r"] == config["lora_alpha"] == largest
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {largest}


@pytest.mark.parametrize(("engine", "case"), [("lorax", "one layer"), ("sglang", "ranks differ")])
def test_a_peft_folder_is_computed_wrongly_or_not_at_all(
    tmp_path: Path, llama_base: Path, engine: str, case: str
) -> None:
    lora = make(llama_base, tmp_path / "lora", **CASES[case])
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_base), str(lora))
    inputs = verification_batch(live)
    truth = logits(live.eval(), inputs)
    write_adapter(lora, tmp_path / "out", base=llama_base, target="peft")
    try:
        deployed = logits(served(llama_base, ENGINES[engine](tmp_path / "out")), inputs)
    except (RuntimeError, KeyError):
        return
    assert float((deployed - truth).abs().max()) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_pruned_to_nothing_is_an_adapter_of_zeros(
    tmp_path: Path, llama_base: Path, engine: str
) -> None:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(llama_base), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "lora")
    write_adapter(tmp_path / "lora", tmp_path / "out", base=llama_base, target=engine)
    deltas = ENGINES[engine](tmp_path / "out")
    assert "model.layers.1.self_attn.q_proj" in deltas
    assert not any(delta.any() for delta in deltas.values())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}, "layernorm"),
    ],
)
def test_what_the_engine_cannot_hold_is_refused(
    tmp_path: Path, llama_base: Path, engine: str, config: dict[str, Any], named: str
) -> None:
    lora = make(llama_base, tmp_path / "lora", **config)
    with pytest.raises(DoraExportError, match=named):
        write_adapter(lora, tmp_path / "out", base=llama_base, target=engine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", [*ENGINES, "gguf"])
def test_the_base_must_be_named(tmp_path: Path, llama_lora: Path, engine: str) -> None:
    with pytest.raises(DoraExportError, match="`base`"):
        write_adapter(llama_lora, tmp_path / "out", target=engine)


def test_the_command_offers_every_profile() -> None:
    (choices,) = (
        parameter.type.choices
        for parameter in adapter_command.command.params
        if parameter.name == "target" and isinstance(parameter.type, click.Choice)
    )
    assert sorted(choices) == sorted(PROFILES)
