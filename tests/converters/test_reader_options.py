"""What a reader takes of the user, of names, and of the smallest models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from converters.options import ReadOptions
from converters.run import Run
from dora_serve import read_run
from tests.converters import test_litgpt as litgpt
from tests.converters import test_mlx_lm as mlx
from tests.converters.other_trainers import drawn, make_base
from tests.converters.test_adalora import train

LLAMA = {"name": "Llama-3.2-1B", "mlp_class_name": "LLaMAMLP"}


def dense(run: Run, module: str) -> torch.Tensor:
    found = run.updates[module].components()
    assert found is not None
    return (found.b.double() * found.c.double()) @ found.a.double()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= 1e-6 * other.norm())


def test_an_alpha_that_is_given_takes_the_place_of_the_runs(
    llama_base: Path, tmp_path: Path
) -> None:
    state: dict[str, torch.Tensor] = {}
    delta = litgpt.pair(state, "lm_head", 80, 32)
    lit = litgpt.write(tmp_path / "litgpt", state, LLAMA)
    ada = tmp_path / "adalora"
    model = LlamaForCausalLM.from_pretrained(llama_base)
    train(model, ada, True, task_type="CAUSAL_LM", target_modules=["q_proj"])
    alpha = json.loads((ada / "adapter_config.json").read_text())["lora_alpha"]
    module = next(iter(read_run(ada).updates))
    own = dense(read_run(ada), module)
    assert float(own.norm()) > 0
    assert same(dense(read_run(ada, ReadOptions(lora_alpha=3 * alpha)), module), 3 * own)
    assert same(dense(read_run(lit), "lm_head"), delta)
    given = ReadOptions(lora_alpha=3 * litgpt.ALPHA)
    assert same(dense(read_run(lit, given), "lm_head"), 3 * delta)


def test_one_group_of_keys_and_values(tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    query, _, value = litgpt.qkv(state, "transformer.h.0.attn.qkv", (32, 8, 8), 32)
    run = read_run(litgpt.write(tmp_path / "run", state, {**LLAMA, "n_query_groups": 1}))
    block = "model.layers.0.self_attn"
    assert same(dense(run, f"{block}.q_proj"), query)
    assert same(dense(run, f"{block}.v_proj"), value)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("Phi-4-mini-instruct", "self_attn.qkv_proj"),
        ("Phi-3.5-mini-instruct", "self_attn.qkv_proj"),
        ("phi-2", "self_attn.q_proj"),
        ("Qwen3-0.6B", "self_attn.q_proj"),
    ],
)
def test_names_of_litgpts_families(name: str, module: str, tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    query, _, _ = litgpt.qkv(state, "transformer.h.0.attn.qkv", (32, 16, 16), 32)
    model = {"name": name, "mlp_class_name": "LLaMAMLP"}
    run = read_run(litgpt.write(tmp_path / "run", state, model))
    assert same(dense(run, f"model.layers.0.{module}")[:32], query)


@pytest.mark.parametrize("name", ["embed_tokens", "wte", "tok_embeddings", "word_embeddings"])
def test_embeddings_of_mlx_are_turned(name: str, tmp_path: Path) -> None:
    a, b = drawn(80, 3), drawn(3, 32, seed=1)
    tensors = {f"model.{name}.lora_a": a, f"model.{name}.lora_b": b}
    run = read_run(mlx.write(tmp_path / "run", tensors))
    update = run.updates[f"model.{name}"]
    assert update.shape == (80, 32)
    assert same(dense(run, f"model.{name}"), mlx.SCALE * a.double() @ b.double())


def test_mlx_names_its_base(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    tensors, _ = mlx.pairs(base, mlx.Q)
    run = read_run(mlx.write(tmp_path / "run", tensors))
    assert run.base == mlx.ARGUMENTS["model"]
    assert read_run(mlx.write(tmp_path / "other", tensors, model=None)).base is None


def test_a_setting_that_peft_does_not_have_is_said(llama_base: Path, tmp_path: Path) -> None:
    """Of a tuner that is not LoRA too, whose own switches are known."""
    model = LlamaForCausalLM.from_pretrained(llama_base)
    train(model, tmp_path / "run", True, task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert read_run(tmp_path / "run").warnings == ()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_magic": True}))
    (warning,) = read_run(tmp_path / "other").warnings
    assert "switches on what is not known here: use_magic" in warning
