"""What each engine can carry, and what is refused or filled up for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from converters.errors import TargetError
from converters.run import Run
from converters.targets.engines import PROFILES
from converters.updates.rank_one import RankOneSum
from converters.updates.update import Update
from dora_serve import write_adapter
from tests.converters import made
from tests.converters.families import save_base
from tests.converters.lora_folder.llama import (
    DOWN1,
    EMBED,
    HEAD,
    K0,
    LAYER,
    Q0,
    assert_deployed,
    deployed,
    gpt2,
    make_run,
    ranks_in,
    stored,
)
from tests.converters.made import low_rank


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
    for only_peft in ("convolutions", "text_models"):
        assert [name for name, p in PROFILES.items() if getattr(p, only_peft)] == ["peft"]
    assert "target_parameters" in PROFILES["peft"].features
    assert "target_parameters" not in PROFILES["vllm"].features


@pytest.mark.parametrize(
    ("module", "model_type", "adapts"),
    [
        ("a.q_proj", "llama", True),
        ("a.q_proj", "gpt2", False),
        ("a.q_proj", "xlm-roberta", False),
        ("a.q_proj", "albert", False),
        ("a.q", "mpnet", False),
        ("a.down_proj", "nomic_bert", False),
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


@pytest.mark.parametrize(
    ("family", "architecture", "adapts"),
    [
        ("gemma3_text", "Gemma3TextModel", False),
        ("gemma3_text", "Gemma3ForCausalLM", True),
        ("bert", "BertModel", True),
        ("bert", "BertForSequenceClassification", False),
        ("modernbert", "ModernBertModel", True),
        ("roberta", "RobertaForSequenceClassification", False),
        ("xlm-roberta", "XLMRobertaModel", True),
    ],
)
def test_embedders_have_classes_of_their_own_in_vllm(
    family: str, architecture: str, adapts: bool
) -> None:
    assert PROFILES["vllm"].adapts("a.q_proj", family, architecture) is adapts
    assert PROFILES["peft"].adapts("a.q_proj", family, architecture) is True


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
        write_adapter(run, tmp_path / "out")  # nobody knows what is tied to it
    assert caught.value.found == EMBED
    (tmp_path / "many").mkdir()
    many: dict[str, Update] = {f"model.layers.{n}.odd": low_rank(4, 4, 1) for n in range(8)}
    with pytest.raises(TargetError, match="cannot carry") as caught:
        write_adapter(Run(tmp_path / "many", "test", many), tmp_path / "out", target="sglang")
    assert str(caught.value.found).endswith("model.layers.5.odd and 2 more")
    bias: dict[str, Update] = {"model.layers.0.q_proj.bias": low_rank(1, 4, 1)}
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
    base = gpt2(tmp_path / "base", layers=2)
    module = "transformer.h.1.mlp.c_fc"
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "test", {module: low_rank(64, 16, 2)})
    write_adapter(run, tmp_path / "out", base=base, target="lorax")
    _, tensors = stored(tmp_path / "out")
    for layer in range(2):
        name = f"base_model.model.transformer.h.{layer}.mlp.c_fc.lora_"
        assert tuple(tensors[f"{name}A.weight"].shape) == (2, 16)
        assert tuple(tensors[f"{name}B.weight"].shape) == (64, 2)


def test_kinds_of_one_name_in_two_places_of_a_layer(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", layers=3)
    place = "transformer.h.{}.{}.c_proj"
    shapes = {"attn": (16, 16), "mlp": (16, 64)}
    adapted = [(0, "attn"), (1, "attn"), (2, "mlp")]
    (tmp_path / "run").mkdir()
    updates: dict[str, Update] = {
        place.format(layer, part): low_rank(*shapes[part], 2) for layer, part in adapted
    }
    run = Run(tmp_path / "run", "test", updates)
    write_adapter(run, tmp_path / "out", base=base, target="lorax")
    _, tensors = stored(tmp_path / "out")
    for layer in range(3):
        for part, (out, inn) in shapes.items():
            name = f"base_model.model.{place.format(layer, part)}.lora_"
            a, b = tensors.pop(f"{name}A.weight"), tensors.pop(f"{name}B.weight")
            assert (tuple(a.shape), tuple(b.shape)) == ((2, inn), (out, 2))
            assert bool(a.any()) is ((layer, part) in adapted)
    assert tensors == {}


def test_classes_that_an_engine_does_not_adapt(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", layers=5)
    (tmp_path / "run").mkdir()
    names = [f"transformer.h.{n}.mlp.c_fc" for n in range(5)]
    for count in (3, 4):
        updates = {name: low_rank(64, 16, 1) for name in names[:count]}
        run = Run(tmp_path / "run", "test", updates)
        with pytest.raises(TargetError, match="gpt2") as caught:
            write_adapter(run, tmp_path / "out", base=base, target="vllm")
        assert caught.value.found == ", ".join(names[:3]) + (" …" if count > 3 else "")


def zeros_in(folder: Path) -> tuple[set[str], set[str]]:
    """The modules stored as zeros, and the others."""
    _, tensors = stored(folder)
    filled: dict[bool, set[str]] = {True: set(), False: set()}
    for name, tensor in tensors.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        filled[bool(tensor.any())].add(module)
    return filled[False], filled[True]


def test_a_module_outside_of_the_layers_stands_alone(tmp_path: Path, llama_base: Path) -> None:
    run = make_run(tmp_path / "run", {HEAD: 2, DOWN1: 2})
    write_adapter(run, tmp_path / "out", base=llama_base, target="lorax")
    assert zeros_in(tmp_path / "out") == ({"model.layers.0.mlp.down_proj"}, {HEAD, DOWN1})


def test_a_kind_of_two_stacks_is_filled_up_in_both(tmp_path: Path) -> None:
    save_base("bart", tmp_path / "base")
    names = [f"model.{stack}.layers.{n}.fc1" for stack in ("encoder", "decoder") for n in (0, 1)]
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", "test", {name: low_rank(48, 32) for name in names[1:3]})
    write_adapter(run, tmp_path / "out", base=tmp_path / "base", target="lorax")
    assert zeros_in(tmp_path / "out") == ({names[0], names[3]}, set(names[1:3]))


def test_a_class_that_transformers_does_not_know_is_filled_up_by_its_files(tmp_path: Path) -> None:
    names = [LAYER.format(layer, "k_proj") for layer in range(3)]
    base = made.make_base(
        tmp_path / "base",
        {f"{name}.weight": torch.ones(6, 4) for name in names},
        architectures=["PartsForCausalLM"],
        model_type="parts",
    )
    run = made.make_run(tmp_path / "run", {names[1]: low_rank(6, 4)})
    write_adapter(run, tmp_path / "out", base=base, target="lorax")
    assert zeros_in(tmp_path / "out") == ({names[0], names[2]}, {names[1]})
    _, tensors = stored(tmp_path / "out")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(2, 4), (6, 2)}
