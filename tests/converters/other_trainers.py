"""Tiny bases, and the model that a trainer other than PEFT trained: its own formula, in float64, in
the order of rows that its own converters give the weights of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from converters.run import Run
from tests.converters.families import DECODER, EXPERTS
from tests.converters.proving import BOUND, Inputs, logits, prove

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**DECODER, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {**DECODER, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {**DECODER, "tie_word_embeddings": False}),
    "phi": ("Phi", {**DECODER, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "mixtral": ("Mixtral", {**DECODER, "num_local_experts": 4, "tie_word_embeddings": False}),
    "qwen3_moe": ("Qwen3Moe", {**DECODER, **EXPERTS, "head_dim": 8, "tie_word_embeddings": False}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 16, "tie_word_embeddings": False},
    ),
    "gpt_neox": (
        "GPTNeoX",
        {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
        | {"tie_word_embeddings": False},
    ),
    "tied": ("Llama", {**DECODER, "tie_word_embeddings": True}),
}
INPUTS: Inputs = {
    "input_ids": torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
}


def make_base(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    name, values = TINY[family]
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**values)
    )
    model.eval().save_pretrained(folder)
    return folder


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator) * 0.3


def weights_of(base: Path) -> dict[str, torch.Tensor]:
    """The tensors on disk, float64."""
    from converters.model.base import open_base

    return {name: tensor.load().double() for name, tensor in open_base(base).tensors.items()}


def truth(base: Path, trained: Mapping[str, torch.Tensor], out: Path) -> torch.Tensor:
    """The logits of the base with `trained`, by names on disk, in the place of its own tensors."""
    from safetensors.torch import save_file

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.config.save_pretrained(out)
    tensors = {name: tensor.float() for name, tensor in {**weights_of(base), **trained}.items()}
    assert set(trained) <= set(weights_of(base))
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors")
    own = transformers.AutoModelForCausalLM.from_pretrained(out)
    return logits(own, INPUTS)


def proved(
    run: Run,
    base: Path,
    trained: Mapping[str, torch.Tensor],
    out: Path,
    targets: tuple[str, ...] = ("peft", "vllm"),
    wrong: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Every artifact of `run` computes the model with `trained`, and none the base, nor the model
    with `wrong`: what a reader would make of it that took the file by its look."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    right = truth(base, trained, out / "truth")
    prove(run, base, INPUTS, right, logits(plain, INPUTS), out, targets)
    if wrong is not None:
        other = truth(base, {**trained, **wrong}, out / "wrong")
        assert float((other - right).abs().max()) > 10 * BOUND
