"""torchtune: `hf_to_tune`, `get_merged_lora_ckpt` and `tune_to_hf` of each family, written out in
float64 on weights in torchtune's own order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from converters.errors import RunError
from converters.readers import ReadOptions
from dora_serve import read_run
from tests.converters.other_trainers import drawn, make_base, proved, weights_of

RANK, ALPHA = 3, 6
HEADS, GROUPS, SIZE = 4, 2, 8
NAMED = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()
HF = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def to_tune(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`hf_to_tune._permute`."""
    turned = weight.view(heads, 2, SIZE // 2, -1).transpose(1, 2)
    return turned.reshape(SIZE * heads, -1)


def to_hf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`tune_to_hf._permute`."""
    turned = weight.view(heads, SIZE // 2, 2, -1).transpose(1, 2)
    return turned.reshape(SIZE * heads, -1)


def heads_of(module: str) -> int | None:
    return {"q_proj": HEADS, "k_proj": GROUPS}.get(module.rpartition(".")[2])


def own_name(module: str) -> str:
    if module == "output":
        return "lm_head.weight"
    _, layer, block, name = module.split(".")
    block = "self_attn" if block == "attn" else "mlp"
    return f"model.layers.{layer}.{block}.{HF.get(name, name)}.weight"


def train(
    base: Path, modules: tuple[str, ...], permuted: bool, dora: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The adapter's state dict, and the merged weights as transformers has them."""
    weights = weights_of(base)
    state: dict[str, torch.Tensor] = {}
    merged: dict[str, torch.Tensor] = {}
    for seed, module in enumerate(modules):
        weight = weights[own_name(module)]
        heads = heads_of(module) if permuted else None
        weight = weight if heads is None else to_tune(weight, heads)
        a, b = drawn(RANK, weight.shape[1], seed=seed), drawn(weight.shape[0], RANK, seed=seed)
        state |= {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}
        weight = weight + ALPHA / RANK * b.double() @ a.double()
        if dora:
            magnitude = drawn(weight.shape[0], seed=seed).abs() + 1
            state[f"{module}.magnitude"] = magnitude
            weight = weight * (magnitude.double() / torch.linalg.norm(weight, dim=1)).view(-1, 1)
        merged[own_name(module)] = weight if heads is None else to_hf(weight, heads)
    return state, merged


def write(folder: Path, state: dict[str, torch.Tensor], base: Path | None) -> Path:
    """The folder of an epoch, as `FullModelHFCheckpointer.save_checkpoint` leaves it."""
    folder.mkdir()
    torch.save(state, folder / "adapter_model.pt")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": NAMED, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if base is not None:
        shutil.copy(base / "config.json", folder)
    return folder


def write_peft(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """`tune_to_peft_adapter_weights`, which reorders q and k whatever the family."""
    tensors = {}
    for name, tensor in state.items():
        module, _, part = name.partition(".lora_")
        letter, heads = part[0].upper(), heads_of(module)
        value = to_hf(tensor, heads).contiguous() if letter == "B" and heads else tensor
        own = own_name(module).removesuffix(".weight")
        tensors[f"base_model.model.{own}.lora_{letter}.weight"] = value
    save_file(tensors, folder / "adapter_model.safetensors")


ALL = (
    *("layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.1.attn.v_proj"),
    *("layers.1.attn.output_proj", "layers.0.mlp.w1", "layers.1.mlp.w2", "layers.0.mlp.w3"),
)


@pytest.mark.supports(method="torchtune", family="llama", targets=("merged", "peft", "vllm"))
def test_llama(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    state, merged = train(base, (*ALL, "output"), permuted=True)
    _, unordered = train(base, (*ALL, "output"), permuted=False)
    run = read_run(write(tmp_path / "run", state, base))
    proved(run, base, merged, tmp_path, wrong=unordered)


@pytest.mark.supports(method="torchtune", family="qwen2", targets=("merged", "peft", "vllm"))
def test_qwen(tmp_path: Path) -> None:
    """Its rows stay in order, and the adapter that torchtune itself writes for PEFT is wrong."""
    base = make_base("qwen2", tmp_path / "base")
    state, merged = train(base, ALL, permuted=False)
    folder = write(tmp_path / "run", state, base)
    write_peft(folder, state)
    assert read_run(folder).method == "torchtune"
    theirs = read_run(folder, ReadOptions(method="peft_lora"))
    ours = read_run(folder).updates["model.layers.0.self_attn.q_proj"]
    other = theirs.updates["model.layers.0.self_attn.q_proj"]
    assert float((ours.components().dense() - other.components().dense()).abs().max()) > 0.1  # type: ignore[union-attr]
    proved(read_run(folder), base, merged, tmp_path)


def test_llama_beside_its_adapter_for_peft(tmp_path: Path) -> None:
    """Of this family both files hold one adapter."""
    base = make_base("llama", tmp_path / "base")
    state, _ = train(base, ALL, permuted=True)
    folder = write(tmp_path / "run", state, base)
    write_peft(folder, state)
    ours, theirs = read_run(folder), read_run(folder, ReadOptions(method="peft_lora"))
    assert ours.updates.keys() == theirs.updates.keys()
    for module, update in ours.updates.items():
        one, other = (each.components().dense() for each in (update, theirs.updates[module]))  # type: ignore[union-attr]
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("size", [8, 12])  # of a head, as its width says or another
@pytest.mark.parametrize(
    ("family", "permuted"),
    [
        *((family, True) for family in ("llama", "mistral", "gemma", "gemma2")),
        *((family, False) for family in ("qwen2", "qwen3")),
    ],
)
def test_the_order_of_rows_in_every_family(
    family: str, permuted: bool, size: int, tmp_path: Path
) -> None:
    """`torchtune/models/<family>/_convert_weights.py`."""
    state: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for layer, heads in (("q_proj", HEADS), ("k_proj", GROUPS), ("v_proj", GROUPS)):
        b, stem = drawn(heads * size, RANK), f"layers.0.attn.{layer}"
        state |= {f"{stem}.lora_a.weight": drawn(RANK, 32), f"{stem}.lora_b.weight": b}
        moved = b.view(heads, size // 2, 2, RANK).transpose(1, 2).reshape(-1, RANK)
        expected[layer] = moved if permuted and layer != "v_proj" else b
        assert not torch.equal(moved, b)
    folder = write(tmp_path / "run", state, None)
    config = {"hidden_size": 32, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    more = {} if size == SIZE else {"head_dim": size}
    (folder / "config.json").write_text(json.dumps({"model_type": family, **config, **more}))
    run = read_run(folder)
    assert {name.rpartition(".")[2] for name in run.updates} == set(expected)
    for name in run.updates:
        found = run.updates[name].components()
        assert found is not None and torch.equal(found.b, expected[name.rpartition(".")[2]])


@pytest.mark.supports(method="torchtune (DoRA)", family="llama", targets=("merged",))
def test_dora(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    state, merged = train(base, ALL, permuted=True, dora=True)
    run = read_run(write(tmp_path / "run", state, base))
    _, plain = train(base, ALL, permuted=True)
    proved(run, base, merged, tmp_path, (), wrong=plain)


@pytest.mark.supports(method="torchtune (DoRA)", family="qwen2", targets=("merged",))
def test_dora_of_layers_with_a_bias(tmp_path: Path) -> None:
    """`DoRALinear.forward` gives the length to `base_out`, in which the bias is."""
    base = make_base("qwen2", tmp_path / "base")
    modules = tuple(name for name in ALL if name != "output")
    state, merged = train(base, modules, permuted=False, dora=True)
    lora, _ = train(base, modules, permuted=False)
    weights, scale = weights_of(base), ALPHA / RANK
    for module in modules:
        name = own_name(module)
        if name.replace("weight", "bias") in weights:
            a, b = (lora[f"{module}.lora_{part}.weight"].double() for part in "ab")
            norm = torch.linalg.norm(weights[name] + scale * b @ a, dim=1)
            bias = name.replace("weight", "bias")
            weights[bias] = torch.arange(len(norm)).double() / len(norm)  # a new one is zero
            merged[bias] = weights[bias] * state[f"{module}.magnitude"].double() / norm
    save_file({n: t.float().contiguous() for n, t in weights.items()}, base / "model.safetensors")
    assert any(name.endswith("bias") for name in merged)
    folder = write(tmp_path / "run", state, base)
    with pytest.raises(RunError, match="without the base"):
        read_run(folder)
    run = read_run(folder, ReadOptions(base=base))
    wrong = {name: weights[name] for name in merged if name.endswith("bias")}
    proved(run, base, merged, tmp_path, (), wrong=wrong)


@pytest.mark.supports(method="torchtune", family="phi3", targets=("merged", "peft"))
def test_phi3(tmp_path: Path) -> None:
    """Weights that transformers stores as one: `phi3_hf_to_tune`, `phi3_tune_to_hf`."""
    base = make_base("phi3", tmp_path / "base")
    weights = weights_of(base)
    state: dict[str, torch.Tensor] = {}
    merged: dict[str, torch.Tensor] = {}
    parts = {
        "self_attn.qkv_proj": [("attn.q_proj", 32), ("attn.k_proj", 16), ("attn.v_proj", 16)],
        "mlp.gate_up_proj": [("mlp.w1", 48), ("mlp.w3", 48)],
        "mlp.down_proj": [("mlp.w2", 32)],
    }
    for own, layers in parts.items():
        name = f"model.layers.1.{own}.weight"
        pieces = list(torch.split(weights[name], [rows for _, rows in layers]))
        for place, (layer, rows) in enumerate(layers):
            if layer == "attn.k_proj":
                continue  # not trained
            a, b = drawn(RANK, pieces[place].shape[1], seed=place), drawn(rows, RANK, seed=place)
            stem = f"layers.1.{layer}"
            state |= {f"{stem}.lora_a.weight": a, f"{stem}.lora_b.weight": b}
            pieces[place] = pieces[place] + ALPHA / RANK * b.double() @ a.double()
        merged[name] = torch.cat(pieces)
    run = read_run(write(tmp_path / "run", state, base))
    assert run.start_rank["model.layers.1.self_attn.qkv_proj"] == 2 * RANK
    proved(run, base, merged, tmp_path, ("peft",))


def test_an_epoch_of_an_old_version(tmp_path: Path) -> None:
    """`adapter_0.pt` alone: base and alpha are said by the user."""
    base = make_base("llama", tmp_path / "base")
    state, merged = train(base, ALL[:2], permuted=True)
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(state, folder / "adapter_0.pt")
    with pytest.raises(RunError, match="lora_alpha"):
        read_run(folder)
    with pytest.raises(RunError, match="`base`"):
        read_run(folder, ReadOptions(lora_alpha=ALPHA))
    run = read_run(folder, ReadOptions(lora_alpha=ALPHA, base=base))
    proved(run, base, merged, tmp_path)
    torch.save(state, folder / "adapter_1.pt")
    with pytest.raises(RunError, match="several epochs"):
        read_run(folder, ReadOptions(lora_alpha=ALPHA, base=base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mllama"}, "names in torchtune are not known"),
        ({"num_attention_heads": 2}, "other rows"),
        ({"num_attention_heads": "many"}, "not a number"),
    ],
)
def test_a_base_that_is_not_its_own(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    state, _ = train(base, ALL[:2], permuted=True)
    folder = write(tmp_path / "run", state, base)
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "head_dim": SIZE, **change}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=message):
        run = read_run(folder)
        assert run.updates["model.layers.0.self_attn.q_proj"]


def test_modules_that_are_not_known(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    for module in ("layers.0.mlp.experts.gate", "fusion_layer"):
        state = {f"{module}.lora_a.weight": drawn(3, 8), f"{module}.lora_b.weight": drawn(8, 3)}
        with pytest.raises(RunError, match="name in transformers"):
            read_run(write(tmp_path / module, state, base))
