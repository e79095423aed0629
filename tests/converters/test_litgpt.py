"""litgpt: `merge` of `litgpt/lora.py` on litgpt's own weights, then `convert_lit_checkpoint`, both
written out in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from converters.errors import RunError
from dora_serve import read_run
from tests.converters.other_trainers import drawn, make_base, proved, weights_of

RANK, ALPHA = 3, 6
HEADS, SIZE = 4, 8
TRAINING: dict[str, Any] = {
    "checkpoint_dir": "checkpoints/org/model",
    "precision": "bf16-true",
    "lora_r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "lora_query": True,
    "lora_key": False,
    "lora_value": True,
    "lora_projection": True,
    "lora_mlp": True,
    "lora_head": True,
}


def write(
    folder: Path, state: dict[str, torch.Tensor], model: dict[str, Any], **training: Any
) -> Path:
    folder.mkdir()
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.dump({**TRAINING, **training}))
    known = {"n_head": HEADS, "n_query_groups": 2, "head_size": SIZE, **model}
    known["hf_config"] = {"org": "org", "name": known["name"]}
    (folder / "model_config.yaml").write_text(yaml.dump(known))
    return folder


def pair(state: dict[str, torch.Tensor], layer: str, out: int, inn: int) -> torch.Tensor:
    """A pair in `state`, and the update of `LoRALinear.get_lora_AB`."""
    a, b = drawn(RANK, inn), drawn(out, RANK, seed=1)
    state |= {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
    return ALPHA / RANK * b.double() @ a.double()


def qkv(
    state: dict[str, torch.Tensor], layer: str, sizes: tuple[int, int, int], inn: int
) -> list[torch.Tensor]:
    """`LoRAQKVLinear.get_lora_AB` of queries and values: A holds a pair's rows after the other's,
    B its columns below one another; keys get zeros."""
    rows = (sizes[0], sizes[2])
    a, b = drawn(2 * RANK, inn), drawn(sum(rows), RANK, seed=1)
    state |= {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
    deltas = [
        ALPHA / RANK * part_b.double() @ part_a.double()
        for part_a, part_b in zip(torch.split(a, RANK), torch.split(b, list(rows)), strict=True)
    ]
    return [deltas[0], torch.zeros(sizes[1], inn, dtype=torch.float64), deltas[1]]


@pytest.mark.supports(method="litgpt", family="llama", targets=("merged", "peft", "vllm"))
def test_llama(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    weights = weights_of(base)
    state: dict[str, torch.Tensor] = {}
    names = ("q_proj", "k_proj", "v_proj")
    deltas = qkv(state, "transformer.h.1.attn.qkv", (32, 16, 16), 32)
    block = "model.layers.1"
    change = {f"{block}.self_attn.{n}.weight": d for n, d in zip(names, deltas, strict=True)}
    layers = {
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    for layer, own in layers.items():
        name = f"{block}.{own}.weight"
        change[name] = pair(state, f"transformer.h.1.{layer}", *weights[name].shape)
    change["lm_head.weight"] = pair(state, "lm_head", 80, 32)
    merged = {name: weights[name] + delta for name, delta in change.items()}
    model = {"name": "Llama-3.2-1B", "mlp_class_name": "LLaMAMLP"}
    run = read_run(write(tmp_path / "run", state, model))
    assert run.base == "org/Llama-3.2-1B"
    assert f"{block}.self_attn.k_proj" not in run.updates
    half = {name: weights[name] + delta / 2 for name, delta in change.items()}
    proved(run, base, merged, tmp_path, wrong=half)


@pytest.mark.supports(method="litgpt", family="gpt_neox", targets=("merged", "peft"))
def test_rows_head_by_head(tmp_path: Path) -> None:
    """`qkv_reassemble`: of every group its queries, its key, its value."""
    base = make_base("gpt_neox", tmp_path / "base")
    weights = weights_of(base)
    state: dict[str, torch.Tensor] = {}
    own = "gpt_neox.layers.0.attention.query_key_value.weight"
    deltas = qkv(state, "transformer.h.0.attn.qkv", (32, 32, 32), 32)
    groups = zip(*(torch.split(delta, SIZE) for delta in deltas), strict=True)
    reassembled = torch.cat([part for group in groups for part in group])
    merged = {own: weights[own] + reassembled}
    for layer, name in (
        ("transformer.h.0.attn.proj", "gpt_neox.layers.0.attention.dense.weight"),
        ("transformer.h.1.mlp.fc", "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"),
        ("transformer.h.1.mlp.proj", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"),
        ("lm_head", "embed_out.weight"),
    ):
        on_disk = name if name in weights else "lm_head.weight"  # its name since transformers 5
        merged[on_disk] = weights[on_disk] + pair(state, layer, *weights[on_disk].shape)
    model = {"name": "pythia-70m", "mlp_class_name": "GptNeoxMLP", "n_query_groups": HEADS}
    run = read_run(write(tmp_path / "run", state, model))
    wrong = {own: weights[own] + torch.cat(deltas)}
    proved(run, base, merged, tmp_path, ("peft",), wrong=wrong)


@pytest.mark.supports(method="litgpt", family="phi3", targets=("merged", "peft"))
def test_phi3(tmp_path: Path) -> None:
    base = make_base("phi3", tmp_path / "base")
    weights = weights_of(base)
    state: dict[str, torch.Tensor] = {}
    block = "model.layers.0"
    deltas = qkv(state, "transformer.h.0.attn.qkv", (32, 16, 16), 32)
    gate = pair(state, "transformer.h.0.mlp.fc_1", 48, 32)
    up = pair(state, "transformer.h.0.mlp.fc_2", 48, 32)
    change = {
        f"{block}.self_attn.qkv_proj.weight": torch.cat(deltas),
        f"{block}.mlp.gate_up_proj.weight": torch.cat([gate, up]),
        f"{block}.mlp.down_proj.weight": pair(state, "transformer.h.0.mlp.proj", 32, 48),
    }
    merged = {name: weights[name] + delta for name, delta in change.items()}
    model = {"name": "Phi-3-mini-4k-instruct", "mlp_class_name": "LLaMAMLP"}
    run = read_run(write(tmp_path / "run", state, model))
    assert run.start_rank[f"{block}.mlp.gate_up_proj"] == 2 * RANK
    proved(run, base, merged, tmp_path, ("peft",))


@pytest.mark.supports(method="litgpt", family="phi", targets=("merged", "peft"))
def test_phi(tmp_path: Path) -> None:
    base = make_base("phi", tmp_path / "base")
    weights = weights_of(base)
    state: dict[str, torch.Tensor] = {}
    block = "model.layers.0"
    deltas = qkv(state, "transformer.h.0.attn.qkv", (32, 32, 32), 32)
    names = ("q_proj", "k_proj", "v_proj")
    change = {f"{block}.self_attn.{n}.weight": d for n, d in zip(names, deltas, strict=True)}
    for layer, own in (("attn.proj", "self_attn.dense"), ("mlp.fc", "mlp.fc1")):
        name = f"{block}.{own}.weight"
        change[name] = pair(state, f"transformer.h.0.{layer}", *weights[name].shape)
    merged = {name: weights[name] + delta for name, delta in change.items()}
    model = {"name": "phi-2", "mlp_class_name": "GptNeoxMLP", "n_query_groups": HEADS}
    proved(read_run(write(tmp_path / "run", state, model)), base, merged, tmp_path, ("peft",))


@pytest.mark.supports(method="litgpt", family="mixtral", targets=("merged",))
def test_experts(tmp_path: Path) -> None:
    base = make_base("mixtral", tmp_path / "base")
    weights = weights_of(base)
    state: dict[str, torch.Tensor] = {}
    merged = {}
    for expert in range(4):
        for layer, own in (("fc_1", "w1"), ("fc_2", "w3"), ("proj", "w2")):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{own}.weight"
            stem = f"transformer.h.1.mlp.experts.{expert}.{layer}"
            merged[name] = weights[name] + pair(state, stem, *weights[name].shape)
    model = {"name": "Mixtral-8x7B-v0.1", "mlp_class_name": "LLaMAMoE"}
    proved(read_run(write(tmp_path / "run", state, model)), base, merged, tmp_path, targets=())


LLAMA = {"name": "Llama-3.2-1B", "mlp_class_name": "LLaMAMLP"}
QKV = "transformer.h.0.attn.qkv"


@pytest.mark.parametrize(
    ("state", "model", "training", "message"),
    [
        ({f"{QKV}.lora_A": (6, 32)}, LLAMA, {}, "incomplete"),
        (
            {f"{QKV}.lora_A": (6, 32), f"{QKV}.lora_B": (48, 3)},
            LLAMA,
            {"lora_key": True},
            "do not fit the configuration",
        ),
        ({"lm_head.lora_A": (3, 32), "lm_head.lora_B": (80, 3)}, LLAMA, {"lora_r": 4}, "lora_r"),
        ({"lm_head.lora_A": (3, 32)}, LLAMA, {"lora_alpha": "much"}, "rank or alpha"),
        ({"lm_head.bias": (80,)}, LLAMA, {}, "no part of LoRA"),
        (
            # What litgpt of 2023 called its one layer for queries, keys and values, head by head.
            {
                "transformer.h.0.attn.attn.lora_A": (3, 32),
                "transformer.h.0.attn.attn.lora_B": (32, 3),
            },
            LLAMA,
            {},
            "name in transformers is not known",
        ),
    ],
)
def test_what_is_not_read(
    state: dict[str, Any],
    model: dict[str, Any],
    training: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    tensors = {name: drawn(*shape) for name, shape in state.items()}
    with pytest.raises(RunError, match=message):
        read_run(write(tmp_path / "run", tensors, model, **training))


def test_its_files(tmp_path: Path) -> None:
    state = {"lm_head.lora_A": drawn(3, 32), "lm_head.lora_B": drawn(80, 3)}
    folder = write(tmp_path / "run", state, LLAMA)
    (folder / "hyperparameters.yaml").write_text("- not\n- a map\n")
    with pytest.raises(RunError, match="configuration of litgpt"):
        read_run(folder)
    (folder / "hyperparameters.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(RunError, match="cannot be read"):
        read_run(folder)
    # Its reader takes time by the square of these: hours.
    (folder / "hyperparameters.yaml").write_text("{" * 90_000)
    with pytest.raises(RunError, match="cannot be read"):
        read_run(folder)
    (folder / "hyperparameters.yaml").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        read_run(folder)
