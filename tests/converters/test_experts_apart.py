"""gpt-oss with linear layers for single experts, as unsloth trains it for bitsandbytes: its names,
merged and written for PEFT, and sets of some experts only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from converters.errors import DoraExportError
from converters.readers import ReadOptions
from converters.readers.experts import partial_experts
from dora_serve import merge, read_run, verify, write_adapter

EXPERTS, WIDTH, INNER, RANK = 4, 32, 16, 3
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["full_attention"],
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "eos_token_id": 1,
}
NAME = "model.layers.0.mlp.experts"
KINDS = {"gate_up_proj": (2 * INNER, WIDTH), "down_proj": (WIDTH, INNER)}
Tensors = dict[str, torch.Tensor]


def make(folder: Path, experts: int = EXPERTS, inner: int = INNER) -> tuple[Path, Path, Tensors]:
    """The base, the adapter of the first `experts`, and what it adds to each parameter."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**{**SIZES, "intermediate_size": inner}))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    model.save_pretrained(folder / "base")
    pattern = r".*mlp\.experts\.(gate_up_projs|down_projs)\.\d+"
    told = LoraConfig(r=RANK, lora_alpha=6, target_modules=pattern, task_type="CAUSAL_LM")
    told.save_pretrained(str(folder / "run"))
    stored: Tensors = {}
    added: Tensors = {}
    for kind, (out, inn) in {**KINDS, "gate_up_proj": (2 * inner, WIDTH)}.items():
        inn = inner if kind == "down_proj" else inn
        added[kind] = torch.zeros(EXPERTS, inn, out)
        for expert in range(experts):
            a, b = torch.randn(RANK, inn) * 0.2, torch.randn(out, RANK) * 0.2
            stem = f"base_model.model.{NAME}.{kind}s.{expert}"
            stored |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            added[kind][expert] = 2 * (b.double() @ a.double()).T
    save_file(stored, folder / "run/adapter_model.safetensors")
    return folder / "base", folder / "run", added


@pytest.mark.supports(
    method="peft_lora", family="gpt_oss (experts apart)", targets=("merged", "peft")
)
@pytest.mark.parametrize(("experts", "inner"), [(EXPERTS, INNER), (3, INNER), (EXPERTS, WIDTH)])
def test_each_expert_gets_its_own(experts: int, inner: int, tmp_path: Path) -> None:
    base, folder, added = make(tmp_path, experts, inner)
    run = read_run(folder, ReadOptions(base=base))
    said = [text for text in run.warnings if "experts of" in text]
    assert len(said) == (experts < EXPERTS)
    merge(run, tmp_path / "merged", base=base)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged/model.safetensors")
    for kind, delta in added.items():
        name = f"{NAME}.{kind}"
        right = before[name].double() + delta
        assert float((after[name] - right).abs().max()) < 1e-6
        assert (
            float((after[name][:experts] - before[name][:experts]).abs().amax((1, 2)).min()) > 0.1
        )
    assert verify(run, tmp_path / "merged", base).passed
    assert not verify(run, base, base).passed

    write_adapter(run, tmp_path / "peft", base=base)
    live = PeftModel.from_pretrained(GptOssForCausalLM.from_pretrained(base), tmp_path / "peft")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found = live.eval()(ids).logits
        merged = GptOssForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert float((found - merged).abs().max()) < 1e-5


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    base, folder, _ = make(tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({n.replace("projs.3.", "projs.4."): t for n, t in load_file(file).items()}, file)
    with pytest.raises(DoraExportError, match="an expert that the base does not have"):
        merge(folder, tmp_path / "out", base=base)


@pytest.mark.parametrize("form", ["x.experts.{}.up_proj", "x.experts.ups.{}", "x.experts.up[{}]"])
def test_sets_of_some_experts_are_said(form: str) -> None:
    modules = ["x.q_proj", *(form.format(n) for n in range(3))]
    for config in ({"num_experts": 4}, {"text_config": {"n_routed_experts": 4}}):
        (said,) = partial_experts(modules, config)
        assert said.startswith("the run adapts 3 of the 4 experts of x.experts.up")
        assert not [*partial_experts([*modules, form.format(3)], config)]
    assert not [*partial_experts(modules, {})]
