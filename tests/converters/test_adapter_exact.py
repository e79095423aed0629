"""Adapters of made-up runs, loaded by PEFT and compared with float64; and all that they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from converters.errors import BaseError, DoraExportError, OutputError, TargetError
from converters.files.tensors import open_file
from converters.run import Run
from converters.targets.engines import PROFILES
from converters.targets.lora_folder.experts import padded, stacked
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update
from dora_serve import write_adapter

LAYER = "model.layers.{}.self_attn.{}"
Q0, Q1 = LAYER.format(0, "q_proj"), LAYER.format(1, "q_proj")
K0, V0 = LAYER.format(0, "k_proj"), LAYER.format(0, "v_proj")
UP0, DOWN1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
SHAPES = {
    Q0: (32, 32),
    Q1: (32, 32),
    K0: (16, 32),
    V0: (16, 32),
    UP0: (48, 32),
    DOWN1: (32, 48),
    EMBED: (80, 32),
    HEAD: (80, 32),
}


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> RankOneSum:
    generator = torch.Generator().manual_seed(seed)
    return RankOneSum(
        torch.randn(rank, shape[1], generator=generator),
        torch.linspace(1, 2, rank) * torch.tensor([1.0, -1.0]).repeat(rank)[:rank],
        torch.randn(shape[0], rank, generator=generator),
    )


@dataclass(frozen=True)
class Dense:
    """An update that is a matrix ΔW and not a sum of components."""

    delta: torch.Tensor
    whole: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    def components(self) -> None:
        return None

    def merge(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        return rows.add_(self.delta[start : start + rows.shape[0]])


def make_run(folder: Path, ranks: Mapping[str, int], **more: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    updates = {m: low_rank(SHAPES[m], rank, n) for n, (m, rank) in enumerate(ranks.items())}
    return Run(folder, "test", updates, **more)


def truth(update: RankOneSum) -> np.ndarray:
    a, c, b = (part.double().numpy() for part in (update.a, update.c, update.b))
    delta: np.ndarray = (b * c) @ a
    return delta


def lazy(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "whole.safetensors")
    return open_file(folder / "whole.safetensors")


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def certificate(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "dora_export.json").read_text())
    return value


def errors(folder: Path) -> dict[str, float]:
    return {name: said["error"] for name, said in certificate(folder)["modules"].items()}


def ranks_in(folder: Path) -> dict[str, int]:
    return {name: said["rank"] for name, said in certificate(folder)["modules"].items()}


def deployed(base: Path, adapter: Path, model: Any = AutoModelForCausalLM) -> dict[str, Any]:
    """The weights that PEFT makes of it, in float64."""
    loaded = PeftModel.from_pretrained(model.from_pretrained(base), str(adapter))
    state = loaded.merge_and_unload().state_dict()
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def assert_deployed(found: Mapping[str, Any], base: Path, run: Run) -> None:
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        expected = weight.double().numpy()
        module = name.removesuffix(".weight")
        if name in run.replaced:
            expected = run.replaced[name].load().double().numpy()
        if module in run.updates:
            update = run.updates[module]
            assert isinstance(update, RankOneSum)
            delta = truth(update)
            expected = expected + (delta.T if delta.shape != expected.shape else delta)
        scale = np.abs(expected).max()
        assert np.abs(found[name] - expected).max() <= 4e-6 * scale, name


@pytest.mark.parametrize(
    "ranks",
    [
        {Q0: 3, K0: 1, UP0: 4, DOWN1: 2, Q1: 4},
        {Q0: 2},
        {Q0: 2, V0: 0, Q1: 5},
        {EMBED: 3, HEAD: 2, Q0: 3},
    ],
    ids=["many", "one", "none in one", "embeddings"],
)
def test_peft_computes_the_run(tmp_path: Path, llama_base: Path, ranks: dict[str, int]) -> None:
    run = make_run(tmp_path / "run", ranks, embeddings=frozenset({EMBED} & ranks.keys()))
    result = write_adapter(run, tmp_path / "out", base=llama_base)
    assert_deployed(deployed(llama_base, tmp_path / "out"), llama_base, run)
    config, tensors = stored(tmp_path / "out")
    alive = {module: rank for module, rank in ranks.items() if rank}
    most = max(alive.values())
    patterns = {f"^{module}": rank for module, rank in alive.items() if rank != most}
    assert config == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(llama_base),
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(alive),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    assert len(tensors) == 2 * len(alive)
    assert result.plan.nbytes == sum(t.numel() * 4 for t in tensors.values())
    assert ranks_in(tmp_path / "out") == ranks
    found = errors(tmp_path / "out")
    assert max(found.values()) < 1e-6
    assert {module for module, error in found.items() if error} <= set(alive)
    assert (result.path, result.warnings) == (tmp_path / "out", ())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "dora_export.json")
    }


def test_without_a_base_the_runs_own_name_of_it_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 2}, base="org/model", task="causal-lm")
    write_adapter(run, tmp_path / "out")
    config, _ = stored(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/model", "CAUSAL_LM")


def test_what_goes_with_the_weights(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 3, V0: 0}, start_rank={Q0: 8, V0: 7}, warnings=("told",))
    result = write_adapter(run, tmp_path / "out", base=llama_base)
    assert result.warnings == ("told",)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and f"base_model: {llama_base}" in card
    assert f"| `{Q0}` | 8 | 3 |" in card and f"| `{V0}` | 7 | 0 |" in card
    assert "3 of 15 rank-1 components" in card and "PeftModel.from_pretrained" in card
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert (said["target"], said["dtype"], said.get("fit")) == ("peft", "float32", None)
    assert said["replaced"] == []
    assert said["modules"] == {
        Q0: {"start_rank": 8, "rank": 3, "error": pytest.approx(0, abs=1e-6)},
        V0: {"start_rank": 7, "rank": 0, "error": 0.0},
    }
    without = make_run(tmp_path / "run", {Q0: 1})
    write_adapter(without, tmp_path / "out2")
    card = (tmp_path / "out2" / "README.md").read_text()
    assert "base_model: unknown" in card and f"| `{Q0}` |  | 1 |" in card
    assert "1 of 0 rank-1" in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_round_the_balanced_factors(
    tmp_path: Path, llama_base: Path, dtype: torch.dtype
) -> None:
    run = make_run(tmp_path / "run", {Q0: 3})
    result = write_adapter(run, tmp_path / "out", base=llama_base, dtype=dtype)
    _, tensors = stored(tmp_path / "out")
    a, b = (tensors[f"base_model.model.{Q0}.lora_{side}.weight"] for side in "AB")
    assert a.dtype == b.dtype == dtype
    update = run.updates[Q0]
    assert isinstance(update, RankOneSum)
    own_a, own_b = update.strip().reduced().sorted().balanced()
    assert torch.equal(a, own_a.to(dtype)) and torch.equal(b, own_b.to(dtype))
    delta = truth(update)
    gap = np.linalg.norm(b.double().numpy() @ a.double().numpy() - delta) / np.linalg.norm(delta)
    assert errors(tmp_path / "out")[Q0] == pytest.approx(gap, rel=1e-4)
    assert result.plan.nbytes == 3 * 64 * 2
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["dtype"] == str(dtype).removeprefix("torch.")


def test_a_lossy_dtype_is_told(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 1, K0: 1})
    tiny = RankOneSum(torch.ones(1, 32), torch.tensor([1e-14]), torch.linspace(1, 2, 32)[:, None])
    run = Run(run.path, "test", {**run.updates, Q0: tiny})
    result = write_adapter(run, tmp_path / "out", base=llama_base, dtype=torch.float16)
    assert errors(tmp_path / "out")[Q0] > 0.05
    assert len(result.warnings) == 1
    assert "torch.float16" in result.warnings[0] and "in 1 modules" in result.warnings[0]


def test_a_run_pruned_to_nothing(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 0, K0: 0})
    write_adapter(run, tmp_path / "out", base=llama_base)
    config, tensors = stored(tmp_path / "out")
    assert (config["target_modules"], config["r"]) == ([Q0], 1)
    assert sorted(tuple(t.shape) for t in tensors.values()) == [(1, 32), (32, 1)]
    assert not any(bool(tensor.any()) for tensor in tensors.values())
    assert errors(tmp_path / "out") == {Q0: 0.0, K0: 0.0}
    assert_deployed(deployed(llama_base, tmp_path / "out"), llama_base, run)


@pytest.mark.parametrize("limit", [{"max_rank": 2}, {"energy": 0.9}, {"budget": 300}])
def test_limits_approximate(tmp_path: Path, llama_base: Path, limit: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", {Q0: 4, UP0: 4})
    result = write_adapter(run, tmp_path / "out", base=llama_base, **limit)
    fit = certificate(tmp_path / "out")["fit"]
    assert fit["limit"] == limit
    assert fit["error"] > 0.01
    assert ranks_in(tmp_path / "out") == fit["ranks"]
    assert sum(fit["ranks"].values()) < 8
    found = deployed(llama_base, tmp_path / "out")
    weights = load_file(llama_base / "model.safetensors")
    lost = total = 0.0
    for module in (Q0, UP0):
        update = run.updates[module]
        assert isinstance(update, RankOneSum)
        gap = found[f"{module}.weight"] - weights[f"{module}.weight"].double().numpy()
        lost += float(np.linalg.norm(gap - truth(update))) ** 2
        total += float(np.linalg.norm(truth(update))) ** 2
    assert fit["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert len(result.warnings) == 1 and result.warnings[0].startswith("approximated")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Approximated**" in card and "| module | start rank | rank | error |" in card
    ((name, value),) = limit.items()
    assert f"({name.replace('_', ' ')} {value})" in card
    assert f"{sum(fit['ranks'].values())} rank-1 components" in card


def test_what_is_no_sum_is_refused_unless_fitted(tmp_path: Path, llama_base: Path) -> None:
    update: Update = Dense(torch.randn(32, 32))
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "test", {Q0: update})
    with pytest.raises(TargetError, match="not low-rank") as caught:
        write_adapter(run, tmp_path / "out", base=llama_base)
    assert caught.value.tensor == Q0
    write_adapter(run, tmp_path / "out", base=llama_base, max_rank=4)
    assert ranks_in(tmp_path / "out") == {Q0: 4}


def test_a_run_without_updates(tmp_path: Path, llama_base: Path) -> None:
    (tmp_path / "run").mkdir()
    whole = lazy(tmp_path / "run", {"lm_head.weight": torch.ones(80, 32)})
    with pytest.raises(TargetError, match="no matrix") as caught:
        write_adapter(
            Run(tmp_path / "run", "test", {}, replaced=whole), tmp_path / "out", base=llama_base
        )
    assert "lm_head.weight" in str(caught.value.found)


@pytest.mark.parametrize("target", ["nonsense", "PEFT", ""])
def test_unknown_targets(tmp_path: Path, target: str) -> None:
    run = make_run(tmp_path / "run", {Q0: 2})
    with pytest.raises(TargetError, match="unknown target") as caught:
        write_adapter(run, tmp_path / "out", target=target)
    assert caught.value.found == target


def test_outputs_are_checked(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 2})
    for target in (tmp_path / "run" / "out", tmp_path):
        with pytest.raises(OutputError, match="inside an input"):
            write_adapter(run, target)
    with pytest.raises(OutputError, match="inside an input"):
        write_adapter(run, llama_base / "out", base=llama_base)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OutputError, match="not empty"):
        write_adapter(run, tmp_path / "out")
    write_adapter(run, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old").exists()


# --- tensors trained whole


def test_whole_tensors_and_biases(tmp_path: Path) -> None:
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
    model.save_pretrained(tmp_path / "base")
    state = model.state_dict()
    query = "roberta.encoder.layer.0.attention.self.query"
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
        {query: low_rank((16, 16), 2)},
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


# --- layouts


def test_conv1d_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    modules = {
        "transformer.h.0.attn.c_attn": (48, 16),
        "transformer.h.1.attn.c_proj": (16, 16),
        "transformer.h.1.mlp.c_proj": (16, 64),
    }
    (tmp_path / "run").mkdir()
    updates = {m: low_rank(shape, n + 1, n) for n, (m, shape) in enumerate(modules.items())}
    run = Run(tmp_path / "run", "test", updates)
    write_adapter(run, tmp_path / "out", base=tmp_path / "base")
    assert stored(tmp_path / "out")[0]["fan_in_fan_out"] is True
    found = deployed(tmp_path / "base", tmp_path / "out")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for module, update in updates.items():
        weight = weights[f"{module}.weight"].double().numpy()
        assert np.allclose(found[f"{module}.weight"], weight + truth(update).T, atol=1e-5)
    dead = Run(run.path, "test", {m: low_rank(s, 0) for m, s in modules.items()})
    write_adapter(dead, tmp_path / "dead", base=tmp_path / "base")


def test_updates_that_do_not_fit_the_base(tmp_path: Path, llama_base: Path) -> None:
    (tmp_path / "run").mkdir()
    for module, shape, kind in (
        ("model.layers.7.self_attn.q_proj", (32, 32), DoraExportError),
        (Q0, (32, 31), BaseError),
    ):
        run = Run(tmp_path / "run", "test", {module: low_rank(shape, 1)})
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
        **{f"{experts}.gate_up_proj[{e}]": low_rank((16, 16), e + 1, e) for e in range(3)},
        **{f"{experts}.down_proj[{e}]": low_rank((16, 8), 2 - e, 9 + e) for e in range(2)},
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
    update = low_rank((8, 16), 1)
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


# --- what engines can carry


def facts(name: str) -> tuple[Any, ...]:
    profile = PROFILES[name]
    whole, kinds = profile.whole_modules, profile.kinds
    return (
        None if whole is None else sorted(whole),
        profile.max_rank,
        (profile.biases, profile.embeds("mistral"), profile.uniform, profile.drops, profile.prefix),
        profile.conv1d,
        None if kinds is None else len(kinds),
        tuple(
            (r.patterns, r.stored_rank, r.rslora)
            for r in (profile.reading, *profile.older.values())
        ),
    )


def test_what_each_engine_reads() -> None:
    """From the engines' sources, see the module."""
    nothing, both, scale = (False, False, False), (True, False, True), (False, False, True)
    assert facts("peft") == (None, None, (True, True, False, False, True), True, None, (both,))
    vllm = (["classifier", "score"], 512, (False,) * 5, True, None, (both, scale))
    assert facts("vllm") == vllm
    sglang: object = ([], None, (False, False, True, False, False), True, 9, (nothing,))
    assert facts("sglang") == sglang
    assert facts("lorax") == ([], None, (False, False, True, True, True), True, 24, (scale,))
    gguf: object = (
        [],
        None,
        (False, True, False, False, False),
        False,
        None,
        ((False, True, False),),
    )
    assert facts("gguf") == gguf
    assert [name for name in PROFILES if PROFILES[name].embeds("llama")] == ["peft", "vllm", "gguf"]
    assert PROFILES["peft"].embeds(None) and not PROFILES["vllm"].embeds(None)
    llama = {f"{kind}_proj" for kind in "q k v o gate up down".split()}
    assert set(PROFILES["sglang"].kinds or ()) == llama | {"qkv_proj", "gate_up_proj"}
    assert llama < (PROFILES["lorax"].kinds or set())
    assert PROFILES["vllm"].slots == (1, 8, 16, 32, 64, 128, 256, 320, 512)
    assert list(PROFILES["vllm"].older) == ["vLLM up to 0.30"]
    assert PROFILES["sglang"].together == (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    )
    assert "target_parameters" in PROFILES["peft"].features
    assert "target_parameters" not in PROFILES["vllm"].features


@pytest.mark.parametrize(
    ("module", "model_type", "adapts"),
    [
        ("a.q_proj", "llama", True),
        ("a.q_proj", "gpt2", False),
        ("a.q_proj", "xlm-roberta", False),
        ("a.q_proj", "albert", False),
        ("lm_head", "qwen2", False),
        ("embed_out", "gpt_neox", False),
        ("a.q_proj", "qwen2", True),
        ("lm_head", "llama", True),
        ("lm_head.q_proj", "qwen2", True),
        ("lm_head", None, True),
    ],
)
def test_which_classes_vllm_adapts(module: str, model_type: object, adapts: bool) -> None:
    assert PROFILES["vllm"].adapts(module, model_type) is adapts
    assert PROFILES["peft"].adapts(module, model_type) is True


@pytest.mark.parametrize("rank", [512, 513])
def test_ranks_over_an_engines_limit(tmp_path: Path, rank: int) -> None:
    (tmp_path / "run").mkdir()
    eye = torch.eye(520)
    run = Run(
        tmp_path / "run", "test", {Q0: RankOneSum(eye[:rank], torch.ones(rank), eye[:, :rank])}
    )
    if rank == 512:
        write_adapter(run, tmp_path / "out", target="vllm")
        assert ranks_in(tmp_path / "out") == {Q0: 512}
    else:
        with pytest.raises(TargetError, match="over the limit") as caught:
            write_adapter(run, tmp_path / "no", target="vllm")
        assert (caught.value.found, caught.value.expected) == (513, "at most 512")


def test_what_an_engine_cannot_carry_is_named(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 1, EMBED: 1}, embeddings=frozenset({EMBED}))
    for target, base in (("vllm", None), ("sglang", llama_base), ("lorax", llama_base)):
        with pytest.raises(TargetError, match="cannot carry") as caught:
            write_adapter(run, tmp_path / "out", base=base, target=target)
        assert caught.value.found == EMBED
    write_adapter(run, tmp_path / "vllm", base=llama_base, target="vllm")  # of this family it can
    _, tensors = stored(tmp_path / "vllm")
    assert f"base_model.model.{EMBED}.lora_embedding_A" in tensors
    run = make_run(
        tmp_path / "run", {Q0: 1, EMBED: 1}, embeddings=frozenset({EMBED}), tied=frozenset({EMBED})
    )
    with pytest.raises(TargetError, match="cannot carry") as caught:
        write_adapter(run, tmp_path / "out", base=llama_base)
    assert caught.value.found == EMBED
    (tmp_path / "many").mkdir()
    many: dict[str, Update] = {f"model.layers.{n}.odd": low_rank((4, 4), 1) for n in range(8)}
    with pytest.raises(TargetError, match="cannot carry") as caught:
        write_adapter(Run(tmp_path / "many", "test", many), tmp_path / "out", target="sglang")
    assert str(caught.value.found).endswith("model.layers.5.odd and 2 more")
    bias: dict[str, Update] = {"model.layers.0.q_proj.bias": low_rank((1, 4), 1)}
    with pytest.raises(TargetError, match="cannot carry"):
        write_adapter(Run(tmp_path / "many", "test", bias), tmp_path / "out")


@pytest.mark.parametrize("target", ["sglang", "lorax"])
def test_engines_of_one_rank_get_every_layer(tmp_path: Path, llama_base: Path, target: str) -> None:
    run = make_run(tmp_path / "run", {K0: 3, DOWN1: 1})
    result = write_adapter(run, tmp_path / "out", base=llama_base, target=target)
    config, tensors = stored(tmp_path / "out")
    attention = ["q_proj", "k_proj", "v_proj"] if target == "sglang" else ["k_proj"]
    kinds = sorted([*attention, "down_proj"])
    assert config["target_modules"] == kinds
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    attn = [LAYER.format(layer, kind) for layer in range(2) for kind in attention]
    assert modules == {*attn, *(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))}
    for name, tensor in tensors.items():
        assert tensor.shape[0 if "lora_A" in name else 1] == 3
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        assert bool(tensor.any()) is (module in run.updates)
        out, inn = (16 if module.endswith(("k_proj", "v_proj")) else 32), 32
        if "down_proj" in module:
            inn = 48
        assert tuple(tensor.shape) == ((3, inn) if "lora_A" in name else (out, 3))
    assert result.plan.nbytes == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert_deployed(deployed(llama_base, tmp_path / "out"), llama_base, run)
    with pytest.raises(TargetError, match="layers must be known"):
        write_adapter(run, tmp_path / "no", target=target)


def test_engines_of_one_rank_on_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    module = "transformer.h.1.mlp.c_fc"
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "test", {module: low_rank((64, 16), 2)})
    write_adapter(run, tmp_path / "out", base=tmp_path / "base", target="lorax")
    _, tensors = stored(tmp_path / "out")
    for layer in range(2):
        name = f"base_model.model.transformer.h.{layer}.mlp.c_fc.lora_"
        assert tuple(tensors[f"{name}A.weight"].shape) == (2, 16)
        assert tuple(tensors[f"{name}B.weight"].shape) == (64, 2)


def test_kinds_of_one_name_in_two_places_of_a_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=20)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    place = "transformer.h.{}.{}.c_proj"
    shapes = {"attn": (16, 16), "mlp": (16, 64)}
    adapted = [(0, "attn"), (1, "attn"), (2, "mlp")]
    (tmp_path / "run").mkdir()
    updates: dict[str, Update] = {
        place.format(layer, part): low_rank(shapes[part], 2) for layer, part in adapted
    }
    run = Run(tmp_path / "run", "test", updates)
    write_adapter(run, tmp_path / "out", base=tmp_path / "base", target="lorax")
    _, tensors = stored(tmp_path / "out")
    for layer in range(3):
        for part, (out, inn) in shapes.items():
            name = f"base_model.model.{place.format(layer, part)}.lora_"
            a, b = tensors.pop(f"{name}A.weight"), tensors.pop(f"{name}B.weight")
            assert (tuple(a.shape), tuple(b.shape)) == ((2, inn), (out, 2))
            assert bool(a.any()) is ((layer, part) in adapted)
    assert tensors == {}


def test_classes_that_an_engine_does_not_adapt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=5, n_head=2, vocab_size=40, n_positions=20)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    (tmp_path / "run").mkdir()
    names = [f"transformer.h.{n}.mlp.c_fc" for n in range(5)]
    for count in (3, 4):
        updates = {name: low_rank((64, 16), 1) for name in names[:count]}
        run = Run(tmp_path / "run", "test", updates)
        with pytest.raises(TargetError, match="gpt2") as caught:
            write_adapter(run, tmp_path / "out", base=tmp_path / "base", target="vllm")
        assert caught.value.found == ", ".join(names[:3]) + (" …" if count > 3 else "")


# --- GGUF


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    result: np.ndarray = pairs.swapaxes(1, 2).reshape(rows.shape)
    return result


def gguf_of(folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    import gguf

    reader = gguf.GGUFReader(folder / f"{folder.name}.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return alpha, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gguf_scales_each_module_by_alpha_over_its_rank(
    tmp_path: Path, llama_base: Path, dtype: torch.dtype
) -> None:
    run = make_run(tmp_path / "run", {V0: 3, DOWN1: 1, UP0: 0, Q0: 2, K0: 2})
    write_adapter(run, tmp_path / "out", base=llama_base, target="gguf", dtype=dtype)
    alpha, tensors = gguf_of(tmp_path / "out")
    places = {V0: "blk.0.attn_v", DOWN1: "blk.1.ffn_down", Q0: "blk.0.attn_q", K0: "blk.0.attn_k"}
    assert {name.rpartition(".lora_")[0] for name in tensors} == {
        f"{place}.weight" for place in places.values()
    }
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for module, place in places.items():
        a, b = (tensors[f"{place}.weight.lora_{side}"].astype(np.float64) for side in "ab")
        update = run.updates[module]
        assert isinstance(update, RankOneSum)
        expected = truth(update)
        if module in (Q0, K0):
            heads = 4 if module == Q0 else 2
            expected = permuted(expected, heads)
        found = alpha / len(a) * b @ a
        gap = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert gap < bound
        assert errors(tmp_path / "out")[module] == pytest.approx(gap, abs=2e-6, rel=1e-2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card and "--lora out.gguf" in card


def test_gguf_needs_what_the_base_says(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {Q0: 2, K0: 1})
    with pytest.raises(TargetError, match="architecture"):
        write_adapter(run, tmp_path / "out", target="gguf")
    config = json.loads((llama_base / "config.json").read_text())
    weights = (llama_base / "model.safetensors").read_bytes()
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(weights)
    count = len(load_file(base / "model.safetensors"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"architectures": None}, "unknown"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"num_hidden_layers": count + 1}, "more layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_attention_heads": 3}, "attention heads|3 heads"),
        ({"num_key_value_heads": 16}, "16 heads"),
        ({"num_attention_heads": -4}, "-4 heads|negative"),
    ]
    for change, says in cases:
        (base / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DoraExportError, match=says):
            write_adapter(run, tmp_path / "out", base=base, target="gguf")
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    write_adapter(run, tmp_path / "out", base=base, target="gguf")
    (base / "config.json").write_text(json.dumps({**config, "num_key_value_heads": None}))
    fits = make_run(tmp_path / "run", {K0: 1})
    write_adapter(fits, tmp_path / "out2", base=base, target="gguf")
    alpha, tensors = gguf_of(tmp_path / "out2")
    update = fits.updates[K0]
    assert isinstance(update, RankOneSum)
    a, b = (tensors[f"blk.0.attn_k.weight.lora_{side}"].astype(np.float64) for side in "ab")
    assert np.allclose(alpha * b @ a, permuted(truth(update), 4), atol=1e-5)
