"""Adapters with tensors trained whole, of other layouts, and of fused experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from converters.errors import BaseError, DoraExportError, TargetError
from converters.run import Run
from converters.targets.lora_folder.experts import padded, stacked
from converters.updates.update import Update
from dora_serve import write_adapter
from tests.converters import made
from tests.converters.families import save_base
from tests.converters.lora_folder.llama import (
    HEAD,
    Q0,
    deployed,
    gpt2,
    make_run,
    stored,
)
from tests.converters.made import delta_of, lazy, low_rank

QUERY, PARTS = "roberta.encoder.layer.0.attention.self.query", ("weight", "bias")


def roberta(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = RobertaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=40,
        max_position_embeddings=20,
    )
    model = RobertaForSequenceClassification(config)
    model.save_pretrained(folder)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def test_whole_tensors_and_biases(tmp_path: Path) -> None:
    state, query = roberta(tmp_path / "base"), QUERY
    changed = ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight"]
    changed += ["classifier.out_proj.bias"]
    changed += [f"{query}.bias", "roberta.encoder.layer.1.output.LayerNorm.weight"]
    changed += [
        "roberta.encoder.layer.1.output.LayerNorm.bias",
        "roberta.encoder.layer.1.output.dense.bias",
    ]
    whole = {name: torch.randn(state[name].shape) for name in changed}
    same = "roberta.encoder.layer.1.output.dense.weight"  # saved, and as it was
    whole[same] = state[same].clone()
    (tmp_path / "run").mkdir()
    run = Run(
        tmp_path / "run",
        "test",
        {query: low_rank(16, 16, 2)},
        replaced=lazy(tmp_path / "run", whole),
        task="sequence-classification",
    )
    result = write_adapter(run, tmp_path / "out", base=tmp_path / "base")
    config_, tensors = stored(tmp_path / "out")
    norm = "roberta.encoder.layer.1.output.LayerNorm"
    assert sorted(config_["modules_to_save"]) == ["classifier", norm]
    assert (config_["bias"], config_["task_type"]) == ("all", "SEQ_CLS")
    names = {name.removeprefix("base_model.model.") for name in tensors if "lora_" not in name}
    assert names == {*changed} - {f"{query}.bias"} | {f"{query}.base_layer.bias"}
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["replaced"] == sorted(changed)
    assert result.plan.nbytes == 4 * (2 * 32 + sum(whole[name].numel() for name in changed))
    found = deployed(tmp_path / "base", tmp_path / "out", RobertaForSequenceClassification)
    for name in changed:
        assert np.allclose(found[name], whole[name].double().numpy()), name
    with pytest.raises(TargetError) as caught:
        write_adapter(run, tmp_path / "vllm", base=tmp_path / "base", target="vllm")
    assert norm in str(caught.value.found) and f"{query}.bias" in str(caught.value.found)
    assert "classifier" not in str(caught.value.found)


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", None])
def test_the_head_that_peft_expects_goes_along_though_nothing_changed_it(
    tmp_path: Path, task: str | None
) -> None:
    state = roberta(tmp_path / "base")
    run = made.make_run(tmp_path / "run", {QUERY: low_rank(16, 16)}, task=task)
    head = {name for name in state if name.startswith("classifier.")} if task else set()
    write_adapter(run, tmp_path / "out", base=tmp_path / "base")
    config, tensors = stored(tmp_path / "out")
    assert config["modules_to_save"] == (["classifier"] if task else None)
    kept = {name.removeprefix("base_model.model.") for name in tensors if "lora_" not in name}
    assert kept == head
    assert all(torch.equal(tensors[f"base_model.model.{name}"], state[name]) for name in head)


def test_what_training_left_of_a_module_comes_from_the_base(tmp_path: Path) -> None:
    """PEFT loads a module whole or not at all."""
    state, norm = roberta(tmp_path / "base"), "roberta.encoder.layer.1.output.LayerNorm"
    whole = {f"{norm}.weight": torch.randn(16), "classifier.dense.weight": torch.randn(16, 16)}
    run = made.make_run(
        tmp_path / "run", {QUERY: low_rank(16, 16)}, replaced=lazy(tmp_path / "run", whole)
    )
    write_adapter(run, tmp_path / "out", base=tmp_path / "base")
    config, tensors = stored(tmp_path / "out")
    assert sorted(config["modules_to_save"]) == ["classifier.dense", norm]
    kept = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    names = {f"{module}.{kind}" for module in ("classifier.dense", norm) for kind in PARTS}
    assert {name for name in kept if "lora_" not in name} == names
    for name in names:
        assert torch.equal(kept[name], whole.get(name, state[name])), name
    found = deployed(tmp_path / "base", tmp_path / "out", RobertaForSequenceClassification)
    assert np.array_equal(found[f"{norm}.weight"], whole[f"{norm}.weight"].double().numpy())


def test_a_stack_that_is_kept_but_for_one_module_is_no_head(tmp_path: Path) -> None:
    """Nothing else under `encoder` is adapted, and the base holds the rest of it."""
    save_base("t5", tmp_path / "base", True)
    module = "decoder.block.0.layer.0.SelfAttention.q"
    whole = {"encoder.final_layer_norm.weight": torch.randn(32)}
    run = made.make_run(
        tmp_path / "run", {module: low_rank(32, 32)}, replaced=lazy(tmp_path / "run", whole)
    )
    write_adapter(run, tmp_path / "out", base=tmp_path / "base")
    config, tensors = stored(tmp_path / "out")
    assert config["modules_to_save"] == ["encoder.final_layer_norm"]
    assert len(tensors) == 3


def test_whole_modules_without_a_base(tmp_path: Path) -> None:
    """Inside the body by their own names, outside of it by the outermost."""
    whole = {
        "model.norm.weight": torch.ones(32),
        "model.layers.0.mlp.down_proj.bias": torch.ones(32),
        "score.dense.weight": torch.ones(2, 32),
        "score.dense.bias": torch.ones(2),
    }
    run = make_run(tmp_path / "run", {Q0: 2}, replaced=lazy(tmp_path / "run", whole))
    write_adapter(run, tmp_path / "out")
    config, tensors = stored(tmp_path / "out")
    assert sorted(config["modules_to_save"]) == ["model.norm", "score"]
    assert config["bias"] == "all"
    assert {f"base_model.model.{name}" for name in whole} <= tensors.keys()


def test_a_head_that_was_resized_and_adapted(tmp_path: Path, llama_base: Path) -> None:
    whole = {"lm_head.weight": torch.randn(80, 32)}
    run = make_run(tmp_path / "run", {Q0: 2, HEAD: 2}, replaced=lazy(tmp_path / "run", whole))
    write_adapter(run, tmp_path / "out", base=llama_base)
    config, tensors = stored(tmp_path / "out")
    assert config["modules_to_save"] is None
    assert torch.equal(
        tensors["base_model.model.lm_head.base_layer.weight"], whole["lm_head.weight"]
    )
    with pytest.raises(TargetError, match="cannot carry"):
        write_adapter(run, tmp_path / "vllm", base=llama_base, target="vllm")


def test_conv1d_weights(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", layers=2)
    modules = {
        "transformer.h.0.attn.c_attn": (48, 16),
        "transformer.h.1.attn.c_proj": (16, 16),
        "transformer.h.1.mlp.c_proj": (16, 64),
    }
    (tmp_path / "run").mkdir()
    updates = {m: low_rank(*shape, n + 1, n) for n, (m, shape) in enumerate(modules.items())}
    run = Run(tmp_path / "run", "test", updates)
    write_adapter(run, tmp_path / "out", base=base)
    assert stored(tmp_path / "out")[0]["fan_in_fan_out"] is True
    found = deployed(base, tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    for module, update in updates.items():
        weight = weights[f"{module}.weight"].double().numpy()
        assert np.allclose(found[f"{module}.weight"], weight + delta_of(update).T, atol=1e-5)
    dead = Run(run.path, "test", {m: low_rank(*s, 0) for m, s in modules.items()})
    write_adapter(dead, tmp_path / "dead", base=base)


def test_updates_that_do_not_fit_the_base(tmp_path: Path, llama_base: Path) -> None:
    (tmp_path / "run").mkdir()
    for module, shape, kind in (
        ("model.layers.7.self_attn.q_proj", (32, 32), DoraExportError),
        (Q0, (32, 31), BaseError),
    ):
        run = Run(tmp_path / "run", "test", {module: low_rank(*shape, 1)})
        with pytest.raises(kind) as caught:
            write_adapter(run, tmp_path / "out", base=llama_base)
        assert module in str(caught.value.tensor)


def moe(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_experts=3,
        num_experts_per_tok=2,
        vocab_size=40,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_adapters_on_fused_experts(tmp_path: Path) -> None:
    base = moe(tmp_path)
    experts = "model.layers.0.mlp.experts"
    updates: dict[str, Update] = {
        **{f"{experts}.gate_up_proj[{e}]": low_rank(16, 16, e + 1, e) for e in range(3)},
        **{f"{experts}.down_proj[{e}]": low_rank(16, 8, 2 - e, 9 + e) for e in range(2)},
    }
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "test", updates, task="causal-lm")
    write_adapter(run, tmp_path / "out", base=base)
    config, tensors = stored(tmp_path / "out")
    assert config["target_parameters"] == [f"{experts}.down_proj", f"{experts}.gate_up_proj"]
    assert config["target_modules"] == []
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    inner = f"base_model.model.{experts}.base_layer.lora_"
    outer = f"base_model.model.{experts}.lora_"
    assert shapes[f"{inner}A.weight"] == (9, 16) and shapes[f"{inner}B.weight"] == (16, 9)
    assert shapes[f"{outer}A.weight"][1] in (8, 16)
    with pytest.raises(TargetError, match="cannot carry"):
        write_adapter(run, tmp_path / "vllm", base=base, target="vllm")


def test_experts_by_their_names_on_disk_become_blocks(tmp_path: Path) -> None:
    """The gate of one expert is the upper half of its block of the parameter; the rest is zero."""
    base, experts = moe(tmp_path), "model.layers.0.mlp.experts"
    update = low_rank(8, 16, 1)
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "test", {f"{experts}.1.gate_proj": update}, task="causal-lm")
    write_adapter(run, tmp_path / "out", base=base)
    config, tensors = stored(tmp_path / "out")
    assert config["target_parameters"] == [f"{experts}.gate_up_proj"]
    a = tensors[f"base_model.model.{experts}.lora_A.weight"]
    b = tensors[f"base_model.model.{experts}.lora_B.weight"]
    assert a.shape[1] == 16 and a.shape[0] == b.shape[1] > 1
    for expert in range(a.shape[0]):
        delta = b[:, expert : expert + 1] @ a[expert : expert + 1]
        right = torch.zeros(16, 16)
        if expert == 1:
            right[:8] = (update.b * update.c) @ update.a
        assert torch.allclose(delta, right, atol=1e-6)


def test_blocks_of_a_parameter_take_the_largest_rank() -> None:
    sizes = {"e.w[0]": (1, 4, 5), "e.w[1]": (3, 4, 5), "e.v[0]": (2, 4, 5), "q": (1, 2, 2)}
    assert padded(sizes) == {**sizes, "e.w[0]": (3, 4, 5)}
    assert padded({"e.w[0]": (0, 4, 5)}) == {"e.w[0]": (0, 4, 5)}
    assert padded({"e.w[1]": (3, 4, 5), "e.w[0]": (1, 4, 5)})["e.w[0]"] == (3, 4, 5)


def test_blocks_are_stacked_in_their_order() -> None:
    blocks = {
        f"m.experts.{name}[{e}]": (torch.full((2, 3), 10.0 * e), torch.full((4, 2), 10.0 * e + 1))
        for name in ("down_proj", "gate_up_proj")
        for e in (10, 2, 0)
    }
    found = stacked(blocks)
    assert list(found) == ["m.experts", "m.experts.base_layer"]
    for a, b in found.values():
        assert a[:, 0].tolist() == [0, 0, 20, 20, 100, 100]
        assert b[0].tolist() == [1, 21, 101, 1, 21, 101]
    alone = {name: pair for name, pair in blocks.items() if "gate_up" in name}
    assert list(stacked(alone)) == ["m.experts"]
    other = {"m.experts.gate_up_proj[0]": alone["m.experts.gate_up_proj[0]"],
             "n.experts.down_proj[0]": alone["m.experts.gate_up_proj[0]"]}  # fmt: skip
    assert list(stacked(other)) == ["m.experts", "n.experts"]
