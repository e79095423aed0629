"""Faults to plant in a sound adapter, and what lint is to say of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dora_serve.commands.lint import TARGETS

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
PREFIX = "base_model.model."
Q = "model.layers.1.self_attn.q_proj"
QA, QB = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
OTHERS = tuple(target for target in TARGETS if target not in ("peft", "transformers"))


@dataclass(frozen=True)
class Fault:
    """`plant` spoils tensors and configuration; the finding `check` names `where`, for exactly
    `targets` at `severity`."""

    check: str
    where: str
    plant: Callable[[Tensors, Config], object]
    severity: str = "error"
    targets: tuple[str, ...] = TARGETS


def rename(old: str, new: str) -> Callable[[Tensors, Config], object]:
    def plant(tensors: Tensors, _config: Config) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return plant


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., object]:
    return lambda tensors, _config: tensors.update({name: value(tensors[name])})


def configure(**values: Any) -> Callable[[Tensors, Config], object]:
    return lambda _tensors, config: config.update(values)


def add(name: str, *shape: int, **values: Any) -> Callable[[Tensors, Config], object]:
    def plant(tensors: Tensors, config: Config) -> None:
        tensors[PREFIX + name] = torch.ones(*shape)
        config.update(values)

    return plant


def without(*parts: str) -> Callable[[Tensors, Config], object]:
    def plant(tensors: Tensors, _config: Config) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return plant


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def plant(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[1, 2] = value
        return tensor

    return plant


def rank_of_q(rank: int) -> Callable[[Tensors, Config], object]:
    def plant(tensors: Tensors, config: Config) -> None:
        tensors[QA], tensors[QB] = torch.ones(rank, 32), torch.ones(32, rank)
        config["rank_pattern"] = {Q: rank}
        config["alpha_pattern"] = {Q: 2 * rank}

    return plant


def all_b_zero(tensors: Tensors, _config: Config) -> None:
    tensors.update({n: torch.zeros_like(t) for n, t in tensors.items() if "lora_B" in n})


def embedding(tensors: Tensors, config: Config) -> None:
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.ones(4, 80)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = torch.ones(32, 4)
    config["target_modules"] = [*config["target_modules"], "embed_tokens"]


def misplaced(tensors: Tensors, config: Config) -> None:
    tensors[f"{PREFIX}model.layers.1.self_attn.q_norm.lora_A.weight"] = torch.ones(4, 32)
    tensors[f"{PREFIX}model.layers.1.self_attn.q_norm.lora_B.weight"] = torch.ones(32, 4)
    config["target_modules"] = [*config["target_modules"], "q_norm"]


FAULTS = {
    "a pattern of alphas": Fault(
        "scale", Q, configure(alpha_pattern={Q: 3}), targets=("sglang", "lorax", "gguf")
    ),
    "older vLLM reads no patterns": Fault(
        "scale", Q, configure(alpha_pattern={Q: 3}), "warning", ("vllm",)
    ),
    "alpha/r where rsLoRA is meant": Fault(
        "scale", Q, configure(use_rslora=True), targets=("sglang", "gguf")
    ),
    "scales differ within a fused layer": Fault(
        "fused", Q, configure(alpha_pattern={Q: 3}), "warning", ("vllm",)
    ),
    "another adapter's configuration": Fault("config-rank", Q, configure(r=8, lora_alpha=16)),
    "A and B of different rank": Fault("pair-rank", f"{Q}.lora_B", change(QB, lambda b: b[:, :3])),
    "ranks differ": Fault("one-rank", Q, rank_of_q(2), targets=("sglang", "lorax")),
    "rank over the limit": Fault("limit", Q, rank_of_q(600), targets=("vllm",)),
    "alpha of zero": Fault("no-scale", "lora_alpha", configure(lora_alpha=0)),
    "no rank": Fault("no-scale", "r", configure(r=None)),
    "no prefix, for PEFT": Fault(
        "prefix", Q, rename(PREFIX, ""), targets=("peft", "lorax")
    ),
    "no prefix, for the others": Fault(
        "prefix", Q, rename(PREFIX, ""), "warning", ("transformers", "vllm", "sglang", "gguf")
    ),
    "name of the adapter in the tensors'": Fault(
        "adapter-name", QA.replace("A.weight", "A.mine.weight"),
        rename("lora_A.weight", "lora_A.mine.weight"),
    ),
    "the name that PEFT takes": Fault(
        "adapter-name", QA.replace("A.weight", "A.default.weight"),
        rename("lora_A.weight", "lora_A.default.weight"), "warning", ("peft",),
    ),
    "a factor twice": Fault(
        "duplicate", f"{Q}.lora_A",
        lambda tensors, _: tensors.update({QA.removeprefix(PREFIX): tensors[QA].clone()}),
    ),
    "B missing": Fault("incomplete", f"{Q}.lora_B", lambda tensors, _: tensors.pop(QB)),
    "A missing": Fault("incomplete", f"{Q}.lora_A", lambda tensors, _: tensors.pop(QA)),
    "a layer the base has not": Fault(
        "no-such-module", Q.replace("1", "7"), rename("layers.1.", "layers.7.")
    ),
    "stored but not targeted": Fault(
        "not-targeted", Q, configure(target_modules=["k_proj", "v_proj"])
    ),
    "stored but in another layer": Fault(
        "not-targeted", Q, configure(layers_to_transform=[0], target_modules=["q_proj"])
    ),
    "no target_modules": Fault("no-targets", "target_modules", configure(target_modules=None)),
    "a layer left out, for LoRAX": Fault(
        "layers", Q, without("layers.1.self_attn.q_proj"), targets=("lorax",)
    ),
    "a layer left out, for SGLang": Fault(
        "layers", Q, without("layers.1.self_attn.q_proj"), "warning", ("sglang",)
    ),
    "a stacked neighbour left out": Fault(
        "stacked", "k_proj", without("k_proj"), "warning", ("sglang",)
    ),
    "a kind the engine does not adapt": Fault(
        "kind", "q_norm", misplaced, targets=("sglang", "lorax")
    ),
    "another width than the base": Fault("shape", Q, change(QA, lambda a: a[:, :16])),
    "NaN": Fault("finite", QA, change(QA, poison(float("nan")))),
    "infinity": Fault("finite", QB, change(QB, poison(float("inf")))),
    "too large for float16": Fault("half", QA, change(QA, lambda a: a * 1e7), "warning"),
    "too small for float16": Fault("half", QB, change(QB, lambda b: b * 1e-10), "warning"),
    "float64": Fault("float64", QA, change(QA, lambda a: a.double()), "warning"),
    "whole numbers": Fault("dtype", QA, change(QA, lambda a: a.int())),
    "every B zero": Fault("zero", "model.layers.0", all_b_zero),
    "one B zero": Fault("zero-module", Q, change(QB, torch.zeros_like), "info"),
    "weight-decomposed": Fault(
        "use_dora", f"{Q}.lora_magnitude_vector",
        add(f"{Q}.lora_magnitude_vector", 32, use_dora=True), targets=("transformers", *OTHERS),
    ),
    "magnitudes that nobody asks for": Fault(
        "use_dora", f"{Q}.lora_magnitude_vector", add(f"{Q}.lora_magnitude_vector", 32)
    ),
    "bias in B": Fault(
        "lora_bias", f"{Q}.lora_B.bias", add(f"{Q}.lora_B.bias", 32, lora_bias=True),
        targets=OTHERS,
    ),
    "trained tokens": Fault(
        "trainable_token_indices", "model.embed_tokens",
        add("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32,
            trainable_token_indices=[1, 2]),
        targets=OTHERS,
    ),
    "adapters on parameters": Fault(
        "target_parameters", "target_parameters", configure(target_parameters=["mlp.w"]),
        targets=OTHERS,
    ),
    "a matrix instead of two": Fault("use_mora", "use_mora", configure(use_mora=True)),
    "a head trained whole": Fault(
        "modules_to_save", "lm_head.weight",
        add("lm_head.weight", 80, 32, modules_to_save=["lm_head"]), targets=OTHERS,
    ),
    "trained biases": Fault(
        "bias", f"{Q}.base_layer.bias", add(f"{Q}.base_layer.bias", 32, bias="all"),
        targets=OTHERS,
    ),
    "an embedding": Fault(
        "embedding", "model.embed_tokens", embedding, targets=("sglang", "lorax")
    ),
    "PiSSA": Fault("init", "init_lora_weights", configure(init_lora_weights="pissa_niter_4")),
    "OLoRA": Fault(
        "init", "init_lora_weights", configure(init_lora_weights="olora"), targets=OTHERS
    ),
    "fan_in_fan_out": Fault(
        "fan_in_fan_out", "layers", configure(fan_in_fan_out=True), "warning"
    ),
    "no LoRA": Fault("peft-type", "peft_type", configure(peft_type="LOHA")),
}  # fmt: skip
