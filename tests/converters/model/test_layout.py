"""Parameters in memory against the class as transformers itself loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converters.errors import BaseError
from converters.model.base import open_base
from converters.model.layout import Layout, is_parameter, split_slice
from converters.updates.update import Update
from dora_serve import merge
from tests.conftest import Dense
from tests.converters import naming
from tests.converters.families import DECODER, save_base
from tests.converters.families import EXPERTS as FUSED
from tests.converters.made import delta_of, lazy, low_rank, make_run
from tests.converters.naming import QWEN3_VISION, ROPE, TEXT, TOKENS

WEIGHTS = "model.safetensors"
KINDS = "gate_up_proj", "down_proj"


@pytest.mark.parametrize(
    ("name", "stem", "index", "parameter"),
    [
        ("a.q_proj", "a.q_proj", None, False),
        ("a.experts.w[3]", "a.experts.w", 3, True),
        ("a.experts.w[123456789]", "a.experts.w", 123456789, True),
        ("a.experts.w[1234567890]", "a.experts.w[1234567890]", None, False),
        ("a.experts.w[-1]", "a.experts.w[-1]", None, False),
        ("a[3].b", "a[3].b", None, False),
        ("[3]", "[3]", None, False),
        ("a.bias", "a.bias", None, True),
        ("a.weight", "a.weight", None, True),
    ],
)
def test_names_of_blocks(name: str, stem: str, index: int | None, parameter: bool) -> None:
    assert split_slice(name) == (stem, index)
    assert is_parameter(name) is parameter


def loaded(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder)
    return model, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_deployed(base: Path, merged: Path, deltas: Mapping[str, torch.Tensor]) -> None:
    """transformers loads `merged` as `base` with `deltas` added in memory, and nothing else."""
    _, before = loaded(base)
    _, after = loaded(merged)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor.double() + deltas.get(name, torch.zeros(())).double()
        assert torch.allclose(after[name].double(), expected, atol=1e-5), name
        assert torch.equal(after[name], tensor) is (name not in deltas), name


EXPERTS = "model.layers.{}.mlp.experts"


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "qwen2-moe"])
@pytest.mark.parametrize("which", [[0, 1, 2, 3], [2], [0, 3]], ids=str)
def test_updates_of_fused_experts_reach_their_parts_on_disk(
    tmp_path: Path, family: str, which: list[int]
) -> None:
    base = tmp_path / "base"
    save_base(family, base)
    _, state = loaded(base)
    updates, deltas = {}, {}
    for layer in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            parameter = f"{EXPERTS.format(layer)}.{name}"
            experts, out, inn = state[parameter].shape
            delta = torch.zeros(experts, out, inn)
            for number, expert in enumerate(which):
                update = low_rank(out, inn, seed=number + layer)
                updates[f"{parameter}[{expert}]"] = update
                delta[expert] = update.dense()
            deltas[parameter] = delta
    norm = "model.layers.0.self_attn.q_proj"
    updates[norm] = low_rank(*state[f"{norm}.weight"].shape)
    deltas[f"{norm}.weight"] = updates[norm].dense()
    run = make_run(
        tmp_path / "run", updates, task="causal-lm", start_rank=dict.fromkeys(updates, 7)
    )
    merge(run, tmp_path / "out", base=base)
    assert_deployed(base, tmp_path / "out", deltas)
    modules = json.loads((tmp_path / "out" / "dora_export.json").read_text())["modules"]
    assert {said["start_rank"] for said in modules.values()} == {7}
    kinds = 3 * len(which) * 2
    assert len(modules) == kinds + 1
    assert {said["rank"] for said in modules.values()} == {2}


def test_an_expert_that_the_base_does_not_have(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("qwen3-moe", base)
    parameter = f"{EXPERTS.format(0)}.down_proj"
    _, state = loaded(base)
    experts, out, inn = state[parameter].shape
    for name, shape, says in (
        (f"{parameter}[{experts}]", (out, inn), "does not have"),
        (f"{parameter}[0]", (out, inn + 1), "does not fit"),
        ("model.layers.0.self_attn.q_proj[0]", (32, 32), "does not have"),
    ):
        run = make_run(tmp_path / "run", {name: low_rank(*shape)}, task="causal-lm")
        with pytest.raises(BaseError, match=says) as caught:
            merge(run, tmp_path / "out", base=base)
        assert caught.value.tensor == name


def test_names_of_older_versions(tmp_path: Path) -> None:
    """BERT's first files say gamma and beta."""
    save_base("bert", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in tensors.items()
    }
    save_file(renamed, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    name = "bert.encoder.layer.0.output.LayerNorm"
    whole = {f"{name}.weight": torch.randn(32), f"{name}.bias": torch.randn(32)}
    query = "bert.encoder.layer.0.attention.self.query"
    update = low_rank(32, 32)
    run = make_run(
        tmp_path / "run",
        {query: update},
        replaced=lazy(tmp_path / "run", whole),
        task="sequence-classification",
        num_labels=2,
    )
    merge(run, tmp_path / "out", base=tmp_path / "base")
    _, before = loaded(tmp_path / "base")
    deltas = {key: tensor - before[key] for key, tensor in whole.items()}
    assert_deployed(
        tmp_path / "base", tmp_path / "out", {f"{query}.weight": update.dense(), **deltas}
    )
    base = open_base(tmp_path / "base")
    layout = Layout(base, "BertForSequenceClassification", 2)
    assert layout.find(f"{name}.weight") == f"{name}.gamma"
    assert layout.find(f"{query}.weight") == f"{query}.weight"
    assert layout.find("bert.nothing.weight") is None
    assert layout.members(f"{name}.weight") == []


def test_what_conversions_fuse(tmp_path: Path) -> None:
    save_base("qwen3-moe", tmp_path / "base")
    base = open_base(tmp_path / "base")
    layout = Layout(base, "Qwen3MoeForCausalLM")
    disk = EXPERTS.format(0)
    assert layout.is_fused(f"{disk}.1.gate_proj")
    assert layout.is_fused(f"{disk}.3.down_proj")
    assert not layout.is_fused("model.layers.0.self_attn.q_proj")
    assert layout.members(f"{disk}.down_proj") == [f"{disk}.{e}.down_proj.weight" for e in range(4)]
    fused = set(layout.members(f"{disk}.gate_up_proj"))
    assert fused == {f"{disk}.{e}.{kind}_proj.weight" for e in range(4) for kind in ("gate", "up")}
    shape = (24, 32)
    place = layout.place(f"{disk}.2.up_proj", shape)
    assert place is not None
    assert (place.parameter, place.rows, place.columns) == (f"{disk}.gate_up_proj", 24, 32)
    assert place.start == 2 * 48 + 24
    assert place.transposed is False
    assert layout.place("model.nothing", (2, 2)) is None


def adapted(
    state: Mapping[str, torch.Tensor], modules: list[str]
) -> tuple[dict[str, Update], dict[str, torch.Tensor]]:
    """An update of each module of a class, and what it adds to the parameter in memory."""
    updates: dict[str, Update] = {}
    deltas = {}
    for number, module in enumerate(modules):
        out, inn = state[f"{module}.weight"].shape
        update = low_rank(out, inn, seed=number)
        updates[module], deltas[f"{module}.weight"] = update, update.dense()
    return updates, deltas


def hrm(folder: Path) -> None:
    values = {**DECODER, "num_key_value_heads": 4, "head_dim": 8}
    torch.manual_seed(0)
    transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**values)).save_pretrained(folder)


@pytest.mark.parametrize(
    "modules",
    [
        ["H.0.self_attn.q_proj", "H.0.self_attn.v_proj", "L.1.mlp.up_proj", "L.1.self_attn.o_proj"],
        ["L.0.self_attn.k_proj"],
        ["H.1.self_attn.gate_proj", "H.1.mlp.gate_proj", "H.1.mlp.up_proj", "H.1.mlp.down_proj"],
        ["H.0.self_attn.o_proj"],
    ],
    ids=len,
)
def test_one_tensor_on_disk_that_becomes_several(tmp_path: Path, modules: list[str]) -> None:
    """HRM stores gate, q, k and v as one tensor, and calls others otherwise."""
    base = tmp_path / "base"
    hrm(base)
    assert "model.H_module.layers.0.attn.gqkv_proj.weight" in load_file(base / WEIGHTS)
    names = [f"model.{module[0]}_module.layers.{module[2:]}" for module in modules]
    updates, deltas = adapted(loaded(base)[1], names)
    merge(make_run(tmp_path / "run", updates, task="causal-lm"), tmp_path / "out", base=base)
    assert_deployed(base, tmp_path / "out", deltas)


def test_an_update_that_is_no_sum_of_a_tensor_with_another_name(tmp_path: Path) -> None:
    base, name = tmp_path / "base", "model.H_module.layers.0.self_attn.{}_proj"
    hrm(base)
    change = torch.randn(32, 32)
    run = make_run(tmp_path / "run", {name.format("o"): Dense(change)}, task="causal-lm")
    merge(run, tmp_path / "out", base=base)
    assert_deployed(base, tmp_path / "out", {f"{name.format('o')}.weight": change})
    key = low_rank(32, 32)
    updates: dict[str, Update] = {name.format("q"): Dense(change), name.format("k"): key}
    part = make_run(tmp_path / "run", updates, task="causal-lm")
    merge(part, tmp_path / "parts", base=base)
    deltas = {"q": change, "k": torch.from_numpy(delta_of(key))}
    deployed = {f"{name.format(kind)}.weight": delta for kind, delta in deltas.items()}
    assert_deployed(base, tmp_path / "parts", deployed)


def test_an_update_that_is_no_sum_of_several_tensors(tmp_path: Path) -> None:
    base, name = tmp_path / "base", f"{EXPERTS.format(0)}.gate_up_proj[1]"
    save_base("mixtral", base)
    run = make_run(tmp_path / "run", {name: Dense(torch.randn(96, 32))}, task="causal-lm")
    with pytest.raises(BaseError, match="cannot be spread") as caught:
        merge(run, tmp_path / "no", base=base)
    assert (caught.value.file, caught.value.tensor) == (run.path, name)


@pytest.mark.parametrize("turned", [True, False])
def test_experts_that_are_transposed_on_loading(tmp_path: Path, turned: bool) -> None:
    """Qwen3-VL's, where the file does not hold them as the class does already."""
    base, name = tmp_path / "base", "model.language_model.layers.0.mlp.experts"
    config = transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, **FUSED, "decoder_sparse_step": 1, "rope_scaling": ROPE},
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        **TOKENS,
    )
    torch.manual_seed(0)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(base)
    if turned:
        tensors = load_file(base / WEIGHTS)
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
        save_file(tensors, base / WEIGHTS, {"format": "pt"})
    _, state = loaded(base)
    updates: dict[str, Update] = {}
    deltas = {f"{name}.{kind}": torch.zeros_like(state[f"{name}.{kind}"]) for kind in KINDS}
    for number, (kind, expert) in enumerate([(KINDS[0], 0), (KINDS[0], 3), (KINDS[1], 2)]):
        _, out, inn = state[f"{name}.{kind}"].shape
        update = low_rank(out, inn, seed=number)
        updates[f"{name}.{kind}[{expert}]"] = update
        deltas[f"{name}.{kind}"][expert] = update.dense()
    merge(make_run(tmp_path / "run", updates, task="causal-lm"), tmp_path / "out", base=base)
    assert_deployed(base, tmp_path / "out", deltas)


def test_a_module_under_its_name_on_disk_has_its_place_in_memory(tmp_path: Path) -> None:
    naming.make(tmp_path, naming.FAMILIES["llava"])
    layout = Layout(open_base(tmp_path / "base"), "LlavaForConditionalGeneration")
    inner = "layers.1.mlp.down_proj"
    place = layout.place(f"language_model.model.{inner}", (32, 48))
    assert place is not None
    assert place.parameter == f"model.language_model.{inner}.weight"
    assert (place.start, place.rows, place.columns, place.transposed) == (0, 32, 48, False)
    assert layout.place(f"model.language_model.{inner}", (32, 48)) == place
    assert layout.place("language_model.model.layers.9.mlp.down_proj", (32, 48)) is None
    with pytest.raises(BaseError, match="does not fit"):
        layout.place(f"model.language_model.{inner}", (32, 49))
    plain = Layout(open_base(tmp_path / "base"), "NothingThatIs")
    assert plain.place(f"model.language_model.{inner}", (32, 48)) is None
