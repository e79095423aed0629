"""Adapters of mlx-lm (ml-explore/mlx-lm, `mlx_lm/tuner/lora.py`, `dora.py` and `utils.py`).

Of a linear layer `lora_a [in, r]` and `lora_b [r, out]`: ΔW = scale·(lora_a·lora_b)ᵀ; of an
embedding `[vocab, r]` and `[r, dim]`: ΔE = scale·lora_a·lora_b, in its use as a head too; of
experts `[E, r, in]` and `[E, out, r]`. With `fine_tune_type` dora each row of W + ΔW gets the
length `m [out]`; with full the tensors are weights. Names are those of transformers, but of
experts, which mlx-lm stacks as `switch_mlp`. Of some families mlx-lm holds other numbers than the
base's files do (`sanitize` in `mlx_lm/models/`): what is trained on those is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ..errors import RunError
from ..files.json_files import is_number
from ..files.tensors import LazyTensor, LazyTensors, load_finite
from ..model.base import BaseModel
from ..model.match import Classes, classes
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.magnitude import MagnitudeUpdate
from ..updates.rank_one import RankOneSum
from ..updates.update import Update
from .mlx_experts import Block, as_held
from .module import AdaptedModule, grouped
from .peft_common import known_base, need_base
from .run_folder import CONFIG_FILE, RunFolder

WEIGHTS = "adapters.safetensors"
_PART = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embeddings")
_TEXT = "language_model."
_OF_CLASS = re.compile(
    r"^language_model\.|\.(switch_(mlp|glu)|experts)\."
)  # names that the class tells
_EXPERTS = re.compile(
    r"(.+)\.(?:switch_mlp|experts|experts\.switch_glu)\.(gate_proj|up_proj|down_proj)"
)
# Families whose weights are multiplied when mlx-lm loads them, and whose norms have 1 added.
_SCALED = ("falcon_h1",)
_SHIFTED = ("qwen3_next", "qwen3_5", "step3p5")
# In the blocks that Mixtral's family calls so, experts' layers have numbers.
_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class MlxLmReader:
    """Reads an adapter folder."""

    name = "mlx_lm"
    looks_for = f"{CONFIG_FILE} and {WEIGHTS}, as mlx-lm writes them"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if folder.has(CONFIG_FILE, WEIGHTS) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        config, path = folder.adapter_config, folder.path / CONFIG_FILE
        kind = config.get("fine_tune_type", "lora")
        base = known_base(options.base, str(config.get("model") or ""))
        stored = folder.tensors(WEIGHTS)
        asked = any(map(_OF_CLASS.search, stored))
        known = classes("causal-lm", None, base) if base is not None and asked else None
        tensors = _as_in_class(stored, known)
        modules, whole = grouped(tensors, _PART)
        if kind not in ("lora", "dora", "full") or bool(modules) == (kind == "full"):
            raise RunError(
                "fine_tune_type is not known, or the file holds something else",
                file=path,
                found=f"{kind}, and {next(iter(tensors), 'no tensor')}",
                expected="lora or dora with tensors lora_a and lora_b, or full without",
            )
        if kind != "full" and whole:
            raise RunError(
                "a tensor that is no part of an adapter",
                file=folder.path / WEIGHTS,
                tensor=next(iter(whole)),
                expected="lora_a, lora_b" + (", m" if kind == "dora" else ""),
            )
        _refuse_other_numbers(folder.path / WEIGHTS, whole, base, options)
        scale = _scale(config, path, options.lora_alpha) if modules else 0.0
        blocks: dict[str, Block] = {}
        embeddings: set[str] = set()
        for name, module in modules.items():
            embedding = name.endswith(_EMBEDDINGS)
            rank = _rank(module)
            shape, found = _updates(module, scale, embedding, kind == "dora")
            blocks |= {own: Block(load, shape, rank) for own, load in found.items()}
            embeddings |= set(found) if embedding else set()
        blocks = as_held(blocks, known)
        model = config.get("model")
        return Run(
            path=folder.path,
            method=self.name,
            updates=LazyUpdates(
                {name: block.load for name, block in blocks.items()},
                {name: block.shape for name, block in blocks.items()},
            ),
            replaced=whole,
            base=str(model) if model else None,
            task="causal-lm",
            start_rank={name: block.rank for name, block in blocks.items()},
            embeddings=frozenset(embeddings),
            tied=frozenset(embeddings),
            files=(folder.path / WEIGHTS, path),
        )


def _as_in_class(tensors: LazyTensors, known: Classes | None) -> LazyTensors:
    """The tensors by the names of the base's class. mlx-lm and mlx-vlm have the text model of
    every multimodal family as `language_model`, and of some that are text alone."""
    if known is None:
        return tensors
    state = known.whole.names.state
    places = (f"model.{_TEXT}", f"{_TEXT}model.", "model.")
    place = next((p for p in places if any(name.startswith(p) for name in state)), None)
    if place is None:
        return tensors

    def named(name: str) -> str:
        if name.startswith(f"{_TEXT}model."):
            return place + name.removeprefix(f"{_TEXT}model.")
        plain = name.removeprefix(_TEXT)
        return plain if plain.startswith("lm_head.") and "lm_head.weight" in state else name

    return {named(name): tensor for name, tensor in tensors.items()}


def _refuse_other_numbers(
    file: Path, whole: LazyTensors, base: BaseModel | None, options: ReadOptions
) -> None:
    """Raise `RunError` where the numbers in `file` are for weights as mlx-lm holds them, and the
    base has others: of another scale, or stacked, turned and renamed (`whole` tensors)."""
    if base is None:
        if whole:
            need_base(options, "whole tensors of mlx-lm", file)
        return
    family = str(base.config.get("model_type"))
    if family in _SCALED or (whole and family.startswith(_SHIFTED)):
        raise RunError(
            "mlx-lm computes with other numbers than the base's files hold of this family",
            file=file,
            found=f"model_type: {family}",
            expected="a family whose weights mlx-lm takes as they are",
            remedy="serve it with mlx-lm",
        )
    for name, tensor in whole.items():
        own = base.find(name)
        if own is None or base.tensors[own].shape != tensor.shape:
            raise RunError(
                "mlx-lm holds this tensor in another form than the base",
                file=file,
                tensor=name,
                found=list(tensor.shape),
                expected="a tensor of the base, of the same shape"
                if own is None
                else list(base.tensors[own].shape),
                remedy="is this the base it was trained on? if it is, serve it with mlx-lm",
            )


def _scale(config: Mapping[str, object], path: Path, alpha_said: float | None) -> float:
    """The scale, which mlx-lm multiplied by alpha/rank before June 2024; `fine_tune_type` came
    later, and so tells that an alpha in the file is read by nothing."""
    said = config.get("lora_parameters")
    said = said if isinstance(said, dict) else {}
    scale, alpha, rank = (said.get(key) for key in ("scale", "alpha", "rank"))
    if not is_number(scale):
        raise RunError(
            "the scale is not known",
            file=path,
            found=scale,
            expected="a number as lora_parameters.scale",
            remedy="write it there, as it was in training",
        )
    if "fine_tune_type" in config or alpha in (None, rank):
        return float(scale)
    if alpha_said is None or not is_number(rank) or not rank:
        raise RunError(
            "it is not known whether alpha was used: mlx-lm multiplied the scale by alpha/rank "
            "before June 2024, and not afterwards",
            file=path,
            found=f"scale {scale}, alpha {alpha}, rank {rank}",
            expected="no alpha in lora_parameters",
            remedy=f"pass `lora_alpha`: {alpha} where it was trained before, {rank} where later",
        )
    return scale * alpha_said / rank


def _rank(module: AdaptedModule) -> int:
    """The rank; raises `RunError` where the tensors do not fit each other."""
    a, b = (module.parts.get(part) for part in ("lora_a", "lora_b"))
    if a is None or b is None:
        raise module.incomplete("lora_a" if a is None else "lora_b", "lora_a and lora_b")
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]
    experts = len(a.shape) == len(b.shape) == 3
    fits |= experts and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    if not fits or (experts and _EXPERTS.fullmatch(module.name) is None):
        raise module.error(
            "lora_a and lora_b do not fit each other",
            "lora_b",
            found=f"{list(a.shape)} and {list(b.shape)}",
            expected="[in, r] and [r, out]; of experts [E, r, in] and [E, out, r]",
        )
    return b.shape[2] if experts else b.shape[0]


def _updates(
    module: AdaptedModule, scale: float, embedding: bool, dora: bool
) -> tuple[tuple[int, int], dict[str, Callable[[], Update]]]:
    """What one module of mlx-lm updates: itself, or every expert of a stack; and its shape."""
    a, b = module.parts["lora_a"], module.parts["lora_b"]
    stack = _EXPERTS.fullmatch(module.name)
    if stack is None or len(a.shape) == 2:
        magnitude = module.parts.get("m")
        if dora:
            module.need("m", a.shape[0] if embedding else b.shape[1], "lora_a, lora_b and m")
        elif magnitude is not None:
            raise module.error("a magnitude, and fine_tune_type is not dora", "m")
        shape = (a.shape[0], b.shape[1]) if embedding else (b.shape[1], a.shape[0])
        return shape, {module.name: partial(_update, a, b, scale, embedding, magnitude)}
    if dora or "m" in module.parts:
        raise module.error("DoRA of experts is not read", "m")
    numbered = stack[1].endswith("block_sparse_moe")
    layer = _NUMBERED[stack[2]] if numbered else stack[2]
    whole = LazyUpdates({"": partial(_stack, a, b, scale)})  # read once for all its experts
    return (b.shape[1], a.shape[2]), {
        f"{stack[1]}.experts.{e}.{layer}": partial(_expert, whole, e, a.shape[1])
        for e in range(a.shape[0])
    }


def _update(
    a: LazyTensor, b: LazyTensor, scale: float, embedding: bool, magnitude: LazyTensor | None
) -> Update:
    pair = _sum(load_finite(b), load_finite(a), scale)  # [in, out] as mlx-lm has it
    delta = pair if embedding else pair.transposed()
    return delta if magnitude is None else MagnitudeUpdate(load_finite(magnitude), delta)


def _stack(a: LazyTensor, b: LazyTensor, scale: float) -> RankOneSum:
    """The pairs of all experts, one behind the other."""
    return _sum(load_finite(a).flatten(0, 1), load_finite(b).transpose(0, 1).flatten(1), scale)


def _expert(whole: LazyUpdates, expert: int, rank: int) -> RankOneSum:
    every, own = whole[""].components(), slice(expert * rank, (expert + 1) * rank)
    assert every is not None
    return RankOneSum(every.a[own].clone(), every.c[own].clone(), every.b[:, own].clone())


def _sum(a: torch.Tensor, b: torch.Tensor, scale: float) -> RankOneSum:
    return RankOneSum(a, torch.full((a.shape[0],), scale), b)
