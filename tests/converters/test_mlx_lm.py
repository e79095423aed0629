"""mlx-lm: `fuse` of `mlx_lm/tuner/lora.py` and `dora.py`, written out in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from converters.errors import RunError
from converters.readers import ReadOptions
from dora_serve import merge, read_run
from tests.converters.families import DECODER, EXPERTS
from tests.converters.naming import FAMILIES as NESTED
from tests.converters.other_trainers import drawn, make_base, proved, truth, weights_of

SCALE = 2.5
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
EMBED = "model.embed_tokens"
# What `save_config` writes: every argument of the trainer.
ARGUMENTS: dict[str, Any] = {
    "adapter_path": "adapters",
    "batch_size": 4,
    "fine_tune_type": "lora",
    "grad_checkpoint": True,
    "iters": 100,
    "lora_parameters": {"rank": 3, "dropout": 0.0, "scale": SCALE},
    "model": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "num_layers": 2,
    "optimizer": "adam",
    "train": True,
}


def write(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "0000100_adapters.safetensors").write_bytes(b"an earlier step, which nobody reads")
    config = {**ARGUMENTS, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pairs(base: Path, *modules: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The file's tensors, and the fused weights."""
    weights = weights_of(base)
    tensors: dict[str, torch.Tensor] = {}
    fused: dict[str, torch.Tensor] = {}
    for module in modules:
        out, inn = weights[f"{module}.weight"].shape
        a, b = drawn(inn, 3), drawn(3, out, seed=1)
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        fused[f"{module}.weight"] = (
            weights[f"{module}.weight"] + (SCALE * b.double().T) @ a.double().T
        )
    return tensors, fused


@pytest.mark.supports(method="mlx_lm", family="llama", targets=("merged", "peft", "vllm"))
def test_lora(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    tensors, fused = pairs(base, Q, DOWN)
    run = read_run(write(tmp_path / "run", tensors))
    assert run.warnings == ()
    assert run.start_rank == {Q: 3, DOWN: 3}
    half = {n: (t + weights_of(base)[n]) / 2 for n, t in fused.items()}
    proved(run, base, fused, tmp_path, wrong=half)


@pytest.mark.supports(method="mlx_lm", family="llama", targets=("merged",))
def test_a_tied_embedding(tmp_path: Path) -> None:
    """`as_linear` adds the pair too, so what is tied to the embedding follows it."""
    base = make_base("tied", tmp_path / "base")
    weight = weights_of(base)[f"{EMBED}.weight"]
    a, b = drawn(weight.shape[0], 3), drawn(3, weight.shape[1], seed=1)
    run = read_run(write(tmp_path / "run", {f"{EMBED}.lora_a": a, f"{EMBED}.lora_b": b}))
    fused = weight + SCALE * a.double() @ b.double()
    proved(run, base, {f"{EMBED}.weight": fused}, tmp_path, targets=())


@pytest.mark.supports(method="mlx_lm (DoRA)", family="llama", targets=("merged",))
def test_dora(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    tensors, fused = pairs(base, Q)
    plain = dict(fused)
    length = drawn(fused[f"{Q}.weight"].shape[0]).abs() + 1
    tensors[f"{Q}.m"] = length
    for name, weight in fused.items():
        fused[name] = (length.double() / weight.norm(dim=1))[:, None] * weight
    run = read_run(write(tmp_path / "run", tensors, fine_tune_type="dora"))
    proved(run, base, fused, tmp_path, (), wrong=plain)
    with pytest.raises(RunError, match="not dora"):
        lora = read_run(write(tmp_path / "lora", tensors))
        merge(lora, tmp_path / "never", base=base)


@pytest.mark.supports(method="mlx_lm (full)", family="llama", targets=("merged",))
def test_full(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    _, fused = pairs(base, Q, DOWN)
    whole = {name: weight.float() for name, weight in fused.items()}
    folder = write(tmp_path / "run", whole, fine_tune_type="full", lora_parameters=None)
    with pytest.raises(RunError, match="without the base"):
        read_run(folder)
    run = read_run(folder, ReadOptions(base=base))
    proved(run, base, fused, tmp_path, targets=())


@pytest.mark.parametrize(
    ("family", "kind", "name", "shape"),
    [
        # `sanitize` stacks experts, adds 1 to norms, and multiplies weights.
        ("qwen3_moe", "full", "model.layers.1.mlp.switch_mlp.up_proj.weight", (4, 24, 32)),
        ("qwen3_next", "full", "model.layers.1.input_layernorm.weight", (32,)),
        ("falcon_h1", "lora", f"{Q}.lora_a", (32, 3)),
    ],
)
def test_other_numbers_than_the_base_holds(
    family: str, kind: str, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """What was trained on them is another model, when it is put into the base as it is."""
    base = make_base("qwen3_moe", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": family}))
    folder = write(tmp_path / "run", {name: drawn(*shape)}, fine_tune_type=kind)
    with pytest.raises(RunError, match=r"another form|other numbers"):
        read_run(folder, ReadOptions(base=base))


@pytest.mark.parametrize(
    ("family", "block", "layers"),
    [
        ("qwen3_moe", "mlp", {"gate_proj": "gate_proj", "down_proj": "down_proj"}),
        ("mixtral", "block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
    ],
)
@pytest.mark.supports(method="mlx_lm", family="mixtral", targets=("merged",))
@pytest.mark.supports(method="mlx_lm", family="qwen3_moe", targets=("merged",))
def test_experts(family: str, block: str, layers: dict[str, str], tmp_path: Path) -> None:
    """`sanitize` stacks the experts as `switch_mlp`, Mixtral's under the names of the others."""
    base = make_base(family, tmp_path / "base")
    weights = weights_of(base)
    tensors: dict[str, torch.Tensor] = {}
    fused: dict[str, torch.Tensor] = {}
    for stacked, own in layers.items():
        names = [f"model.layers.1.{block}.experts.{e}.{own}.weight" for e in range(4)]
        out, inn = weights[names[0]].shape
        a, b = drawn(4, 3, inn), drawn(4, out, 3, seed=1)
        module = f"model.layers.1.{block}.switch_mlp.{stacked}"
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        delta = SCALE * b.double() @ a.double()
        fused |= {name: weights[name] + delta[e] for e, name in enumerate(names)}
    run = read_run(write(tmp_path / "run", tensors))
    turned = {n: fused[n.replace("experts.0", "experts.1")] for n in fused if "experts.0" in n}
    proved(run, base, fused, tmp_path, (), wrong=turned)


@pytest.mark.parametrize("saved", ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"])
def test_a_text_model_inside(saved: str, tmp_path: Path) -> None:
    """mlx-lm nests it as `language_model`, where transformers has `model.language_model`, and for a
    base of text alone too, where transformers nests nothing."""
    base, sees = tmp_path / "base", saved.endswith("Generation")
    config = NESTED["qwen3.5"].config()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    getattr(transformers, saved)(config if sees else config.text_config).save_pretrained(base)
    place = "model.language_model." if sees else "model."
    modules = [f"{place}layers.1.self_attn.q_proj", f"{place}layers.0.mlp.down_proj", "lm_head"]
    tensors, fused = pairs(base, *modules)
    named = {
        "language_model." + (f"model.{n.removeprefix(place)}" if n.startswith(place) else n): tensor
        for n, tensor in tensors.items()
    }
    run = read_run(write(tmp_path / "run", named), ReadOptions(base=base))
    assert sorted(run.updates) == sorted(modules)
    merge(run, tmp_path / "merged", base=base)
    found = weights_of(tmp_path / "merged")
    assert all(torch.allclose(found[name], weight, atol=1e-6) for name, weight in fused.items())


@pytest.mark.parametrize("halves", [("gate_proj", "up_proj"), ("up_proj",)])
@pytest.mark.parametrize(
    ("family", "inside", "stack"),
    [
        ("gemma4_text", "experts", "experts.switch_glu"),
        ("qwen3_vl_moe", "mlp.experts", "mlp.switch_mlp"),
    ],
)
def test_experts_that_loading_knows_as_one(
    family: str, inside: str, stack: str, halves: tuple[str, ...], tmp_path: Path
) -> None:
    """Their files hold those of a layer as one parameter, the rows of gate_proj above up_proj's."""
    base, sizes = tmp_path / "base", {**DECODER, **EXPERTS, "head_dim": 8}
    if family == "gemma4_text":
        config = transformers.Gemma4TextConfig(
            **sizes,
            enable_moe_block=True,
            top_k_experts=2,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
        )
        transformers.Gemma4ForCausalLM(config).save_pretrained(base)
    else:
        both = NESTED["qwen3-vl"].config().to_dict()
        config = transformers.Qwen3VLMoeConfig(
            text_config={**both["text_config"], **sizes, "model_type": "qwen3_vl_moe_text"},
            vision_config={**both["vision_config"], "model_type": "qwen3_vl_moe"},
        )
        transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(base)
    weights = weights_of(base)
    gate_up = next(n for n in weights if n.endswith(f"layers.1.{inside}.gate_up_proj"))
    fused = {name: weights[name].clone() for name in (gate_up, gate_up.replace("gate_up", "down"))}
    place = "language_model.model." if "language_model" in gate_up else "model."
    tensors: dict[str, torch.Tensor] = {}
    for seed, layer in enumerate((*halves, "down_proj")):
        weight = fused[gate_up if layer in halves else gate_up.replace("gate_up", "down")]
        half = weight.shape[1] // 2
        own = {"gate_proj": weight[:, :half], "up_proj": weight[:, half:]}.get(layer, weight)
        a, b = drawn(4, 3, own.shape[2], seed=seed), drawn(4, own.shape[1], 3, seed=seed + 5)
        module = f"{place}layers.1.{stack}.{layer}"
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        own += SCALE * b.double() @ a.double()
    run = read_run(write(tmp_path / "run", tensors), ReadOptions(base=base))
    assert len(run.updates) == 8  # of four experts, two parameters
    merge(run, tmp_path / "merged", base=base)
    found = weights_of(tmp_path / "merged")
    assert all(torch.allclose(found[name], weight, atol=1e-6) for name, weight in fused.items())


@pytest.mark.parametrize("width", [24, 32, 16])  # down_proj is a square at 32, gate_up_proj at 16
def test_experts_whose_halves_come_in_turn(width: int, tmp_path: Path) -> None:
    """gpt-oss has `[E, in, out]`, a column of gate_proj and one of up_proj in turn."""
    base = tmp_path / "base"
    config = transformers.GptOssConfig(
        **{**DECODER, "intermediate_size": width, "head_dim": 8, "num_local_experts": 4}
    )
    transformers.GptOssForCausalLM(config).save_pretrained(base)
    place = "model.layers.1.mlp.experts."
    weights = {n: w for n, w in weights_of(base).items() if n.startswith(place)}
    fused = {n: w.clone() for n, w in weights.items() if n.endswith("_proj")}
    gate_up, down = fused[f"{place}gate_up_proj"], fused[f"{place}down_proj"]
    own = {"gate_proj": gate_up[..., ::2], "up_proj": gate_up[..., 1::2], "down_proj": down}
    tensors: dict[str, torch.Tensor] = {}
    for seed, (layer, weight) in enumerate(own.items()):
        a, b = drawn(4, 3, weight.shape[1], seed=seed), drawn(4, weight.shape[2], 3, seed=seed + 5)
        tensors |= {f"{place}{layer}.lora_a": a, f"{place}{layer}.lora_b": b}
        weight += SCALE * (b.double() @ a.double()).transpose(1, 2)
    run = read_run(write(tmp_path / "run", tensors), ReadOptions(base=base))
    assert len(run.updates) == 8  # of four experts, two parameters
    merge(run, tmp_path / "merged", base=base)
    found = weights_of(tmp_path / "merged")
    assert all(torch.allclose(found[name], weight, atol=1e-6) for name, weight in fused.items())


@pytest.mark.parametrize(("said", "factor"), [(6, 2.0), (3, 1.0)])
def test_alpha_of_old_versions(said: int, factor: float, tmp_path: Path) -> None:
    """Up to June 2024 the scale was scale·alpha/rank; `fine_tune_type` is newer than that."""
    base = make_base("llama", tmp_path / "base")
    tensors, _ = pairs(base, Q)
    parameters = {"rank": 3, "alpha": 6, "dropout": 0.0, "scale": SCALE}
    old = write(tmp_path / "old", tensors, fine_tune_type=None, lora_parameters=parameters)
    with pytest.raises(RunError, match="whether alpha was used"):
        read_run(old)
    run = read_run(old, ReadOptions(lora_alpha=said))
    assert run.updates[Q].components().c.tolist() == [SCALE * factor] * 3  # type: ignore[union-attr]
    new = read_run(write(tmp_path / "new", tensors, lora_parameters=parameters))
    assert new.updates[Q].components().c.tolist() == [SCALE] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_parameters": {"rank": 3}}, "scale is not known"),
        ({"fine_tune_type": "prompt"}, "fine_tune_type"),
        ({"fine_tune_type": "full"}, "fine_tune_type"),
    ],
)
def test_what_is_not_read(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_a": drawn(32, 3), f"{Q}.lora_b": drawn(3, 32)}
    with pytest.raises(RunError, match=message):
        read_run(write(tmp_path / "run", tensors, **change))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_a": drawn(3, 32), f"{Q}.lora_b": drawn(32, 3)}  # PEFT's way round
    with pytest.raises(RunError, match="do not fit"):
        read_run(write(tmp_path / "run", {**tensors, f"{Q}.lora_b": drawn(31, 3)}))
    with pytest.raises(RunError, match="no part of an adapter"):
        read_run(write(tmp_path / "more", {**tensors, "model.norm.weight": drawn(32)}))


def test_the_truth_knows_a_transposed_pair(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    _, fused = pairs(base, Q)
    own = truth(base, fused, tmp_path / "one")
    lying = {name: weight.T.contiguous() for name, weight in fused.items()}
    assert float((own - truth(base, lying, tmp_path / "other")).abs().max()) > 1e-2


@pytest.mark.supports(method="mlx_lm", family="qwen2_moe", targets=("peft",))
def test_a_router(tmp_path: Path) -> None:
    """Since transformers 5 it is no linear layer, and PEFT puts no pair beside it."""
    base = make_base("qwen2_moe", tmp_path / "base")
    tensors, fused = pairs(base, "model.layers.1.mlp.gate", Q)
    proved(read_run(write(tmp_path / "run", tensors)), base, fused, tmp_path, ("peft",))
