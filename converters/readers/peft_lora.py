"""LoRA adapters as PEFT saves them (huggingface/peft, `src/peft/tuners/lora/`).

Scale alpha/r, or alpha/√r with rsLoRA, with each module's own rank and alpha. Read here: linear
layers, Conv1D, embeddings, parameters (`target_parameters`), `modules_to_save`, trained biases and
`lora_bias`, resized embeddings, single trained tokens (`trainable_token_indices`). What is not read
is an error that says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite
from ..run import LazyUpdates, Run
from ..updates.rank_one import RankOneSum
from ..updates.update import Update
from . import ReadOptions
from .checkpoint import more_than_lora
from .peft_common import (
    CONFIG_FILE,
    WEIGHT_FILES,
    Scaling,
    check_pair,
    open_weights,
    origin,
    read_config,
    refuse_unread,
)
from .peft_parameters import TOKENS, parameter_updates, parameters, token_rows

_BIAS = ".lora_B.bias"
_LORA = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")

# Initialisations that change the base weights: the adapter is right on the changed base only.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHERS = ("use_dora", "use_mora")  # readers of their own
_UNREAD = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "kasa_config": "KaSA, which takes components out of the base",
    "ensure_weight_tying": "one update of an embedding and the head tied to it",
}


class PeftLoraReader:
    """Reads an adapter folder."""

    name = "peft_lora"
    looks_for = f'{CONFIG_FILE} with peft_type "LORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, path: Path) -> Path | None:
        config = read_config(path)
        own = config.get("peft_type") == "LORA" and not any(config.get(key) for key in _OTHERS)
        return path if own and not more_than_lora(path) else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        config_path = folder / CONFIG_FILE
        config = read_config(folder)
        _refuse_unread(config, config_path)
        file, tensors = open_weights(folder)
        pairs: dict[str, dict[str, LazyTensor]] = {}
        whole: dict[str, LazyTensor] = {}
        tokens: dict[str, LazyTensor] = {}
        biases: dict[str, LazyTensor] = {}
        embeddings = set()
        for name, tensor in tensors.items():
            if match := _LORA.fullmatch(name):
                pairs.setdefault(match[1], {})[match[2] or match[3]] = tensor
                if match[3]:
                    embeddings.add(match[1])
            elif name.endswith(TOKENS):
                tokens[name.removesuffix(TOKENS)] = tensor
            elif name.endswith(_BIAS):
                biases[name.removesuffix(_BIAS)] = tensor
            else:
                whole[name.replace(".base_layer.", ".")] = tensor

        refuse_unread((name for name in whole if "lora_magnitude_vector" not in name), file)
        scaling = Scaling(config, config_path, options)
        updates: dict[str, Callable[[], Update]] = {}
        start_rank: dict[str, int] = {}
        named = parameters(config, pairs, config_path)
        for module, parts in pairs.items():
            rank = check_pair(module, parts, file)
            if module in named:
                rank, loaders = parameter_updates(named[module], parts, rank, scaling, file)
            else:
                scale = scaling.of(module, rank)
                loaders = {module: _loader(parts, scale, module in embeddings)}
            updates |= loaders
            start_rank |= dict.fromkeys(loaders, rank)
        for module, bias in biases.items():
            if module not in start_rank:
                raise RunError(
                    "a bias without the pair that it belongs to",
                    file=file,
                    tensor=bias.name,
                    expected="lora_A and lora_B beside it",
                )
            scale = scaling.of(module, start_rank[module])
            updates[f"{module}.bias"] = _bias_loader(bias, scale)
        for module, rows in tokens.items():
            updates[module] = token_rows(config, module, rows, whole, options, file)
        # An adapter on an embedding or head may carry its weight along: untouched, or resized.
        heads = {name: t for name, t in whole.items() if name.removesuffix(".weight") not in pairs}
        return Run(
            path=folder,
            method=self.name,
            updates=LazyUpdates(updates),
            replaced=whole,
            **origin(config, heads),
            start_rank=start_rank,
            embeddings=frozenset(embeddings | tokens.keys()),
            tied=frozenset(tokens),
            files=(file, config_path),
        )


def _refuse_unread(config: dict[str, object], path: Path) -> None:
    for key, meaning in _UNREAD.items():
        if config.get(key):
            raise RunError(
                f"{key} ({meaning}) is not read by this reader",
                file=path,
                found=f"{key}: {str(config[key])[:80]}",
                remedy="merging it as plain LoRA would compute something else",
            )
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(BASE_CHANGING):
        raise RunError(
            "the adapter's initialisation changed the base weights, so it is not an update "
            "of the original base",
            file=path,
            found=f"init_lora_weights: {config['init_lora_weights']}",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion, "
            "which makes a plain LoRA adapter",
        )


def _loader(parts: dict[str, LazyTensor], scale: float, embedding: bool) -> Callable[[], Update]:
    def load() -> Update:
        a, b = load_finite(parts["A"]), load_finite(parts["B"])
        update = RankOneSum(a, torch.full((a.shape[0],), scale), b)
        # ΔE = (B·A)ᵀ for an embedding stored as [vocab, dim].
        return update.transposed() if embedding else update

    return load


def _bias_loader(bias: LazyTensor, scale: float) -> Callable[[], Update]:
    def load() -> Update:
        a = load_finite(bias).view(1, -1)
        return RankOneSum(a, torch.tensor([scale]), torch.ones(1, 1))

    return load
