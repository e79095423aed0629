"""LoRA adapters as PEFT saves them (huggingface/peft, `src/peft/tuners/lora/`).

Scale alpha/r, or alpha/√r with rsLoRA, with each module's own rank and alpha. Read here: linear
layers, Conv1D, convolutions, torch's MultiheadAttention, embeddings, parameters
(`target_parameters`), `modules_to_save`, trained biases and `lora_bias`, resized embeddings, single
trained tokens (`trainable_token_indices`). What is not read is an error that says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite, numel
from ..model.base import open_base
from ..model.match import class_trained
from ..model.tying import embedding_in, spreading
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from ..updates.rank_one import RankOneSum
from ..updates.update import Update
from .lora_reader import AdapterFiles
from .module import AdaptedModule, adapted, grouped
from .peft_common import (
    ATTENTION_OUT,
    Scaling,
    is_variant,
    of_training_alone,
    refuse_tinker,
    refuse_variant,
)
from .peft_initial import Initial
from .peft_laid import experts_of, turned
from .peft_parameters import TOKENS, Laid, parameter_updates, parameters, token_rows
from .restarts import refuse_restarted
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder
from .unsloth import by_expert, not_said

_BIAS, _EMBEDDING = ".lora_B.bias", ".lora_embedding_A"
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")  # read by peft_dora
_LORA = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")

_OTHERS = ("use_dora", "use_mora")  # readers of their own


class PeftLoraReader:
    """Reads an adapter folder."""

    name = "peft_lora"
    looks_for = f'{CONFIG_FILE} with peft_type "LORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, folder: RunFolder) -> RunFolder | None:
        config = folder.adapter_config
        kind = config.get("peft_type") == "LORA" or config.get("invocation_string")
        own = kind and not any(config.get(key) for key in _OTHERS)
        return folder if own and (is_variant(config) or not _more_than_pairs(folder)) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        config, config_path = folder.adapter_config, folder.path / CONFIG_FILE
        refuse_variant(config, config_path)
        refuse_restarted(folder.path)
        files = AdapterFiles(folder)
        refuse_tinker(files.tensors, config_path)
        files.tensors = {n: t for n, t in files.tensors.items() if not of_training_alone(config, n)}
        pairs, others = grouped(files.tensors, _LORA)
        tokens, biases, embeddings = (
            {name.removesuffix(end): t for name, t in files.tensors.items() if name.endswith(end)}
            for end in (TOKENS, _BIAS, _EMBEDDING)
        )
        read = (TOKENS, _BIAS, *(_MAGNITUDES if config.get("use_dora") else ()))
        rest = {name for name in others if not name.endswith(read)}
        own = {tensor.name for name, tensor in files.tensors.items() if name not in rest}
        run = files.rest(own, pairs)
        scaling = Scaling(config, config_path, options)
        initial = Initial(config, config_path, run, options)
        updates: dict[str, Callable[[], Update]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        start_rank: dict[str, int] = {}
        kernels: dict[str, tuple[int, ...]] = {}
        named = parameters(config, pairs, config_path)
        experts = {parameter: pairs[name].shape for name, parameter in named.items()}
        other_way = turned(config, experts, run, config_path, options) if experts else frozenset()
        several = [name for name in experts if scaling.rank(name) > 1]
        apart = by_expert(config, several, run, config_path, options)
        counts = experts_of(experts, run, options)
        for name, module in pairs.items():
            rank, shape = module.pair(), module.shape
            if name not in embeddings:
                initial.check(module, name in named)
            if name in named:
                other = named[name] in other_way
                laid = Laid(other, named[name] in apart, counts.get(named[name]))
                rank, loaders = parameter_updates(named[name], module, rank, scaling, laid)
                shape = shape[::-1] if other else shape
            else:
                own_name, times = _attention(name, pairs)
                scale = times * scaling.of(name.removesuffix(ATTENTION_OUT), rank)
                loaders = {own_name: partial(_update, initial, module, scale, name in embeddings)}
                shape = shape[::-1] if name in embeddings else shape
                kernels |= {own_name: module.kernel} if module.kernel else {}
            updates |= loaders
            shapes |= dict.fromkeys(loaders, shape)
            start_rank |= dict.fromkeys(loaders, rank)
        for name, bias in biases.items():
            if name not in start_rank:
                raise RunError(
                    "a bias without the pair that it belongs to",
                    file=bias.path,
                    tensor=bias.name,
                    expected="lora_A and lora_B beside it",
                )
            updates[f"{name}.bias"] = partial(_bias, bias, scaling.of(name, start_rank[name]))
            shapes[f"{name}.bias"] = (1, numel(bias))
        for name, rows in tokens.items():
            vocab, updates[name] = token_rows(config, name, tokens, run, options)
            shapes[name] = (vocab, rows.shape[1])
        run = replace(
            run,
            updates=LazyUpdates(updates, shapes),
            start_rank=start_rank,
            embeddings=frozenset(embeddings | tokens),
            kernels=kernels,
            warnings=(*run.warnings, *not_said(apart, config)),
        )
        return replace(run, tied=_spreading(config, tokens, run, options))


def _attention(name: str, pairs: Collection[str]) -> tuple[str, int]:
    """What the pair `name` updates, and how often PEFT adds it there.

    On torch's own MultiheadAttention PEFT puts one pair on `in_proj_weight` and one on the linear
    layer `out_proj` inside; its `merge`, which its forward pass uses, adds the latter twice.
    """
    if f"{name}{ATTENTION_OUT}" in pairs:
        return f"{name}.in_proj_weight", 1
    if name.endswith(ATTENTION_OUT) and name.removesuffix(ATTENTION_OUT) in pairs:
        return name.replace(ATTENTION_OUT, ".out_proj"), 2
    return name, 1


def _more_than_pairs(folder: RunFolder) -> bool:
    """Whether there are other tensors beside lora_A and lora_B, which are other methods'."""
    modules = {} if folder.adapter_file is None else adapted(folder.adapter)
    return any(module.parts.keys() - {"A", "B"} for module in modules.values())


def _spreading(
    config: Mapping[str, object], tokens: Collection[str], run: Run, options: ReadOptions
) -> frozenset[str]:
    """The embeddings whose trained rows are also those of what is tied to them. Of a resized one
    PEFT stores the rows of a tied head too, which has none of its own unless it is named."""
    if not tokens or options.base is None:
        return frozenset(tokens)
    base = open_base(options.base)
    names = class_trained(run, base).names
    indices = config.get("trainable_token_indices")
    said = list(indices) if isinstance(indices, dict) else [embedding_in(names.model)]
    named = [n for n in tokens if any(f".{n}".endswith(f".{key}") for key in said)]
    return spreading(named or tokens, base, names.architecture, run.num_labels)


def _update(initial: Initial, module: AdaptedModule, scale: float, embedding: bool) -> Update:
    if embedding:  # ΔE = (B·A)ᵀ for an embedding stored as [vocab, dim]
        return module.sum(scale).transposed()
    return initial.update(module, scale)


def _bias(bias: LazyTensor, scale: float) -> Update:
    return RankOneSum(load_finite(bias).view(1, -1), torch.tensor([scale]), torch.ones(1, 1))
