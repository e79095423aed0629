"""Adapters, sound and spoilt, with the engines that compute what was trained of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
import torch

from tests.converters.naming import BOTH, INPUTS, PREFIX

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Plant = Callable[[Tensors, Config], object]
NONE: frozenset[str] = frozenset()
PEFT, TRANSFORMERS = frozenset({"peft"}), frozenset({"transformers"})
Q = "layers.0.self_attn.q_proj"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONVOLUTION = ["q_proj", "patch_embed.proj"]
BLOCKS = peft.BdLoraConfig(
    target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2, match_strict=False
)
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@dataclass(frozen=True)
class Case:
    """`trained`: settings of the training, beside those of `naming`; `plant` then spoils the file.
    `computes`: the engines that compute what was trained."""

    family: str
    computes: frozenset[str]
    plant: Plant | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)


def named(part: str, new: str, only: str = "") -> Plant:
    def plant(tensors: Tensors, _config: Config) -> None:
        for key in [key for key in tensors if part in key and only in key]:
            tensors[key.replace(part, new)] = tensors.pop(key)

    return plant


def without(*parts: str) -> Plant:
    def plant(tensors: Tensors, _config: Config) -> None:
        for key in [key for key in tensors if all(part in key for part in parts)]:
            del tensors[key]

    return plant


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    def plant(tensors: Tensors, _config: Config) -> None:
        tensors.update({key: change(t) for key, t in tensors.items() if part in key})

    return plant


def said(**values: Any) -> Plant:
    return lambda _tensors, config: config.update(values)


def unsaid(key: str) -> Plant:
    return lambda _tensors, config: config.pop(key)


def longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:3]])


def old_regex(tensors: Tensors, config: Config) -> None:
    named("model.language_model.", "language_model.model.")(tensors, config)
    config["target_modules"] = r"language_model\.model.*\.(q_proj|v_proj|down_proj)"


def old_regex_that_fits(tensors: Tensors, config: Config) -> None:
    named("model.language_model.", "language_model.model.")(tensors, config)
    config["target_modules"] = r".*language_model.*\.(q_proj|v_proj|down_proj)"


QUICK: dict[str, Case] = {
    "as PEFT saves it": Case("llama", BOTH),
    "a module of no name": Case("llama", NONE, named("q_proj", "z_proj", "layers.0")),
    "a layer too many": Case("llama", NONE, named("layers.1", "layers.7")),
    "A missing": Case("llama", NONE, without(Q, "lora_A")),
    "B missing": Case("llama", NONE, without(Q, "lora_B")),
    "B of another height": Case("llama", NONE, changed("k_proj.lora_B", lambda b: b[:8])),
    "another rank than said": Case("llama", NONE, said(rank_pattern={"q_proj": 3})),
    "patterns": Case(
        "llama",
        BOTH,
        trained={
            "rank_pattern": {"q_proj": 3, "layers.1.*down_proj": 2},
            "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3},
        },
    ),
    "no r, of the rank PEFT takes": Case("llama", BOTH, unsaid("r"), {"r": 8}),
    "no r, of another rank": Case("llama", NONE, unsaid("r")),
    "no alpha, and it was what PEFT takes": Case("llama", BOTH, unsaid("lora_alpha")),
    "alpha of zero": Case("llama", NONE, said(lora_alpha=0)),
    "alpha below zero": Case("llama", BOTH, trained={"lora_alpha": -4}),
    "a regular expression that misses": Case("llama", NONE, said(target_modules=r".*\.z_proj")),
    "all linear layers": Case("llama", BOTH, trained={"target_modules": "all-linear"}),
    "all linear layers, and the head stored": Case(
        "llama",
        NONE,
        said(target_modules="all-linear"),
        {"target_modules": ["q_proj", "lm_head"]},
    ),
    "excluded in training": Case("llama", BOTH, trained={"exclude_modules": [Q]}),
    "excluded and stored": Case("llama", NONE, said(exclude_modules=[f"model.{Q}"])),
    "excluded by a pattern, and stored": Case("llama", NONE, said(exclude_modules=rf".*{Q}")),
    "one layer only": Case("llama", BOTH, trained={"layers_to_transform": [1]}),
    "one layer, and others stored": Case("llama", NONE, said(layers_to_transform=[0])),
    "layers of another name": Case(
        "llama", NONE, said(layers_pattern="blocks"), {"layers_to_transform": [1]}
    ),
    "no targets": Case("llama", NONE, said(target_modules=[])),
    "whole head": Case("llama", BOTH, trained={"modules_to_save": ["lm_head"]}),
    "whole head that the configuration does not say": Case(
        "llama", BOTH, said(modules_to_save=None), {"modules_to_save": ["lm_head"]}
    ),
    "more words than the base has": Case(
        "llama",
        NONE,
        lambda tensors, config: [
            changed(part, longer)(tensors, config) for part in ("embed_tokens", "lm_head")
        ],
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "magnitudes": Case("llama", PEFT, trained={"use_dora": True}),
    "one magnitude lost": Case("llama", NONE, without("magnitude", Q), {"use_dora": True}),
    "every magnitude lost": Case("llama", NONE, without("magnitude"), {"use_dora": True}),
    "repeated layers": Case("llama", BOTH, trained={"layer_replication": [[0, 2], [1, 2]]}),
    "a layer that PEFT would make up": Case(
        "llama", NONE, without(Q), {"init_lora_weights": False}
    ),
    "the principal components": Case("llama", BOTH, trained={"init_lora_weights": "pissa"}),
    "principal components, roughly": Case(
        "llama", NONE, trained={"init_lora_weights": "pissa_niter_4"}
    ),
    "an orthogonal start": Case("llama", BOTH, trained={"init_lora_weights": "olora"}),
    "MonteCLoRA": Case("llama", BOTH, trained={"monteclora_config": peft.MontecloraConfig()}),
    "KaSA": Case("llama", BOTH, trained={"kasa_config": peft.KasaConfig()}),
    "BD-LoRA": Case("llama", BOTH, trained={"use_bdlora": BLOCKS}),
    "BD-LoRA of another number of blocks": Case(
        "llama",
        NONE,
        said(use_bdlora={**asdict(BLOCKS), "nblocks": 4}),
        {"use_bdlora": BLOCKS},
    ),
    "blocks that nobody says": Case("llama", NONE, said(use_bdlora=None), {"use_bdlora": BLOCKS}),
    "another tuner's name": Case("llama", NONE, said(peft_type="LOHA")),
    "a task that PEFT has not": Case("llama", NONE, said(task_type="WHATEVER")),
    "another base's name": Case("llama", BOTH, said(base_model_name_or_path="org/other")),
}
FURTHER: dict[str, Case] = {
    "VeLoRA": Case("llama", BOTH, trained={"velora_config": peft.VeloraConfig()}),
    "VeLoRA, begun at random": Case(
        "llama", BOTH, trained={"velora_config": peft.VeloraConfig(init_type="random")}
    ),
    "KaSA that nobody says": Case(
        "llama", NONE, said(kasa_config=None), {"kasa_config": peft.KasaConfig()}
    ),
    "KaSA without its diagonal": Case(
        "llama", NONE, without("lora_diag"), {"kasa_config": peft.KasaConfig()}
    ),
    "aLoRA": Case(
        "llama", PEFT, trained={"alora_invocation_tokens": INPUTS["input_ids"][0, :2].tolist()}
    ),
    "Arrow without the adapters that it chooses of": Case(
        "llama", NONE, said(arrow_config={"top_k": 2})
    ),
    "MiCA": Case("llama", BOTH, trained={"init_lora_weights": "mica"}),
    "rank-stabilized": Case("llama", BOTH, trained={"use_rslora": True}),
    "full names": Case("llama", BOTH, trained={"target_modules": [f"model.{Q}"]}),
    "one more target that is none": Case("llama", BOTH, said(target_modules=[*LINEAR, "zzz"])),
    "both transposed": Case("llama", NONE, changed("lora_", lambda t: t.T)),
    "A of three axes": Case("llama", NONE, changed(f"{Q}.lora_A", lambda a: a[None])),
    "a bias in B": Case("llama", BOTH, trained={"lora_bias": True}),
    "a whole norm": Case("llama", BOTH, trained={"modules_to_save": ["norm"]}),
    "rows of the embedding": Case("llama", BOTH, trained={"trainable_token_indices": [23, 41]}),
    "magnitudes that nobody says": Case("llama", NONE, said(use_dora=False), {"use_dora": True}),
    "the embedding": Case("llama", BOTH, trained={"target_modules": ["q_proj", "embed_tokens"]}),
    "a stranger among the tensors": Case(
        "llama", BOTH, lambda t, _: t.update({f"{PREFIX}model.zzz.weight": torch.ones(3)})
    ),
    "LoftQ without its configuration": Case("llama", NONE, said(init_lora_weights="loftq")),
    "convolutions of rank 1": Case("gpt2", BOTH),
    "stored as [in, out], and not said": Case("gpt2", BOTH, said(fan_in_fan_out=False)),
    "magnitudes beside [in, out]": Case("gpt2", PEFT, trained={"use_dora": True}),
    "a classifier": Case("bert", BOTH),
    "a classifier without its head": Case("bert", NONE, without("classifier")),
    "a head without its bias": Case("bert", NONE, without("classifier.bias")),
    "a head under PEFT's inner name": Case(
        "bert", TRANSFORMERS, named("classifier.", "classifier.modules_to_save.default.")
    ),
    "a pooler too": Case("bert", BOTH, trained={"modules_to_save": ["classifier", "pooler"]}),
    "biases": Case("bert", BOTH, trained={"bias": "all"}),
    "biases that nobody says": Case("bert", BOTH, said(bias="none"), {"bias": "all"}),
    "biases lost": Case("bert", NONE, without("bias"), {"bias": "all"}),
    "an adapted classifier": Case(
        "bert", BOTH, trained={"target_modules": ["query", "classifier"]}
    ),
    "a tied head": Case("qwen2", BOTH, trained={"target_modules": ["q_proj", "lm_head"]}),
    "a tied embedding": Case("qwen2", BOTH, trained={"target_modules": ["q_proj", "embed_tokens"]}),
    "a tied embedding, and its head with it": Case(
        "qwen2",
        BOTH,
        trained={"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "a whole tied head": Case("qwen2", BOTH, trained={"modules_to_save": ["lm_head"]}),
    "a regular expression of transformers 4": Case("gemma3", NONE, old_regex),
    "a regular expression that fits both": Case("gemma3", BOTH, old_regex_that_fits),
    "the tower too": Case("gemma3", BOTH, trained={"target_modules": ["q_proj", "v_proj"]}),
    "a convolution": Case("qwen2-vl", BOTH, trained={"target_modules": CONVOLUTION}),
    "a convolution of another kernel": Case(
        "qwen2-vl",
        NONE,
        changed("patch_embed.proj.lora_A", lambda a: a[..., :1]),
        {"target_modules": CONVOLUTION},
    ),
    "experts": Case("qwen3-moe", BOTH, trained=EXPERTS),
    "experts by the names that they had": Case(
        "qwen3-moe",
        BOTH,
        trained={"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "experts that nobody says": Case("qwen3-moe", NONE, said(target_parameters=None), EXPERTS),
    "experts without a prefix": Case("qwen3-moe", BOTH, named(PREFIX, ""), EXPERTS),
    "experts under names of AutoModel": Case(
        "qwen3-moe", TRANSFORMERS, named("model.layers.", "layers."), EXPERTS
    ),
    "wrapped experts": Case("qwen3-moe", NONE, named("layers.0.", "layers.0._orig_mod."), EXPERTS),
    "experts of a layer too many": Case(
        "qwen3-moe", NONE, named("layers.1.", "layers.7."), EXPERTS
    ),
    "experts of another width": Case(
        "qwen3-moe", NONE, changed("experts.lora_A", lambda a: a[:, :8]), EXPERTS
    ),
    "too few experts": Case("qwen3-moe", NONE, changed("experts.lora_A", lambda a: a[:8]), EXPERTS),
    "a router": Case("qwen3-moe", BOTH, trained={"target_parameters": ["mlp.gate.weight"]}),
}
