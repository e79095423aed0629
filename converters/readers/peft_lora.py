"""LoRA adapters as PEFT saves them (huggingface/peft, `src/peft/tuners/lora/`).

Scale alpha/r, or alpha/√r with rsLoRA, with each module's own rank and alpha. Read here: linear
layers, Conv1D, embeddings, parameters (`target_parameters`), `modules_to_save`, trained biases and
`lora_bias`, resized embeddings, single trained tokens (`trainable_token_indices`). What is not read
is an error that says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite, numel
from ..model.base import open_base
from ..model.match import target_architecture
from ..model.tying import spreading
from ..run import LazyUpdates, Run
from ..updates.rank_one import RankOneSum
from ..updates.update import Update
from . import ReadOptions
from .lora_reader import AdapterFiles
from .module import AdaptedModule, adapted, grouped
from .peft_common import Scaling, broken_promises
from .peft_parameters import TOKENS, parameter_updates, parameters, token_rows
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_BIAS, _EMBEDDING = ".lora_B.bias", ".lora_embedding_A"
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")  # read by peft_dora
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

    def detect(self, folder: RunFolder) -> RunFolder | None:
        config = folder.adapter_config
        own = config.get("peft_type") == "LORA" and not any(config.get(key) for key in _OTHERS)
        return folder if own and not _more_than_pairs(folder) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = AdapterFiles(folder)
        config, config_path = files.config, files.config_path
        _refuse_unread(config, config_path)
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
        updates: dict[str, Callable[[], Update]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        start_rank: dict[str, int] = {}
        named = parameters(config, pairs, config_path)
        for name, module in pairs.items():
            rank, shape = module.pair(), module.shape
            if name in named:
                rank, loaders = parameter_updates(named[name], module, rank, scaling)
            else:
                scale = scaling.of(name, rank)
                loaders = {name: partial(_update, module, scale, name in embeddings)}
                shape = shape[::-1] if name in embeddings else shape
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
            vocab, updates[name] = token_rows(config, name, rows, run.replaced, options)
            shapes[name] = (vocab, rows.shape[1])
        return replace(
            run,
            updates=LazyUpdates(updates, shapes),
            start_rank=start_rank,
            embeddings=frozenset(embeddings | tokens),
            tied=_spreading(tokens, run, options),
            warnings=broken_promises(config, files.tensors),
        )


def _more_than_pairs(folder: RunFolder) -> bool:
    """Whether there are other tensors beside lora_A and lora_B, which are other methods'."""
    modules = {} if folder.adapter_file is None else adapted(folder.adapter)
    return any(module.parts.keys() - {"A", "B"} for module in modules.values())


def _refuse_unread(config: Mapping[str, object], path: Path) -> None:
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


def _spreading(tokens: Collection[str], run: Run, options: ReadOptions) -> frozenset[str]:
    """The embeddings whose trained rows are also those of what is tied to them."""
    if not tokens or options.base is None:
        return frozenset(tokens)
    base = open_base(options.base)
    architecture, _ = target_architecture(run, base)
    return spreading(tokens, base, architecture, run.num_labels)


def _update(module: AdaptedModule, scale: float, embedding: bool) -> Update:
    update = module.sum(scale)
    # ΔE = (B·A)ᵀ for an embedding stored as [vocab, dim].
    return update.transposed() if embedding else update


def _bias(bias: LazyTensor, scale: float) -> Update:
    return RankOneSum(load_finite(bias).view(1, -1), torch.tensor([scale]), torch.ones(1, 1))
