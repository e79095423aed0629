"""LoRA adapters as PEFT saves them (huggingface/peft, `src/peft/tuners/lora/`).

Scale alpha/r, or alpha/√r with rsLoRA, with each module's own rank and alpha. Read here: linear
layers, Conv1D and embeddings, `modules_to_save`, trained biases. Not read: `lora_bias`,
`target_parameters`, `trainable_token_indices`, which are errors that say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import torch

from ..errors import MissingError, RunError
from ..run import HEADS, LazyUpdates, Run
from ..tensors import LazyTensor, load_finite, open_file, read_json
from ..update import RankOneSum, Update
from . import ReadOptions

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")

# With bias="all" PEFT also saves the wrapper's copies of a head it saves under its own name.
_COPY = re.compile(r"\.(original_module|modules_to_save)\.")

# Initialisations that change the base weights: the adapter is right on the changed base only.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHERS = ("use_dora", "use_mora")  # readers of their own
_UNREAD = {
    "lora_bias": "bias inside lora_B",
    "target_parameters": "adapters on parameters",
    "trainable_token_indices": "single trained tokens",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
}


class PeftLoraReader:
    """Reads an adapter folder."""

    name = "peft_lora"
    looks_for = f'{CONFIG_FILE} with peft_type "LORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, path: Path) -> Path | None:
        file = path / CONFIG_FILE
        config = read_json(file) if file.is_file() else {}
        own = config.get("peft_type") == "LORA" and not any(config.get(key) for key in _OTHERS)
        return path if own else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        config_path = folder / CONFIG_FILE
        config = read_json(config_path)
        _refuse_unread(config, config_path)
        file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if file is None:
            raise MissingError(
                "the adapter has no weights", file=folder, expected=" or ".join(WEIGHT_FILES)
            )
        pairs: dict[str, dict[str, LazyTensor]] = {}
        whole: dict[str, LazyTensor] = {}
        embeddings = set()
        for full_name, tensor in open_file(file).items():
            name = full_name.removeprefix(_PREFIX)
            if match := _LORA.fullmatch(name):
                pairs.setdefault(match[1], {})[match[2] or match[3]] = tensor
                if match[3]:
                    embeddings.add(match[1])
            elif not _COPY.search(name):
                whole[name.replace(".base_layer.", ".")] = tensor

        scaling = _Scaling(config, config_path, options)
        updates: dict[str, Callable[[], Update]] = {}
        start_rank = {}
        for module, parts in pairs.items():
            start_rank[module] = _check_shapes(module, parts, file)
            scale = scaling.of(module, start_rank[module])
            updates[module] = _loader(parts, scale, module in embeddings)
        # An adapter on an embedding or head may carry its untouched base weight along.
        replaced = {
            name: t for name, t in whole.items() if name.removesuffix(".weight") not in pairs
        }
        task_type = config.get("task_type")
        task = next((task for task, (_, peft) in HEADS.items() if peft == task_type), None)
        base = config.get("base_model_name_or_path")
        return Run(
            path=folder,
            method=self.name,
            updates=LazyUpdates(updates),
            replaced=replaced,
            base=str(base) if base else None,
            task=task,
            num_labels=_num_labels(replaced) if task == "sequence-classification" else None,
            start_rank=start_rank,
            embeddings=frozenset(embeddings),
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
    if init.startswith(_BASE_CHANGING):
        raise RunError(
            "the adapter's initialisation changed the base weights, so it is not an update "
            "of the original base",
            file=path,
            found=f"init_lora_weights: {config['init_lora_weights']}",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion, "
            "which makes a plain LoRA adapter",
        )


def _check_shapes(module: str, parts: dict[str, LazyTensor], file: Path) -> int:
    missing = {"A", "B"} - parts.keys()
    if missing:
        raise RunError(
            "an adapted module is incomplete",
            file=file,
            tensor=f"{module}.lora_{missing.pop()}",
            found=f"only lora_{next(iter(parts))}",
            expected="lora_A and lora_B",
        )
    a, b = parts["A"], parts["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise RunError(
            "lora_A and lora_B are of different rank (or not of linear layers)",
            file=file,
            tensor=f"{module}.lora_B",
            found=list(b.shape),
            expected=f"[out, {a.shape[0]}] beside lora_A {list(a.shape)}",
        )
    return a.shape[0]


class _Scaling:
    def __init__(self, config: dict[str, object], path: Path, options: ReadOptions) -> None:
        self._path = path
        self._config = config
        self._alpha = options.lora_alpha
        self._rank_pattern = self._patterns("rank_pattern")
        self._alpha_pattern = self._patterns("alpha_pattern")

    def _patterns(self, key: str) -> dict[str, float]:
        value = self._config.get(key) or {}
        if not isinstance(value, dict) or not all(_is_number(n) for n in value.values()):
            raise RunError(f"{key} is not a map of numbers", file=self._path, found=value)
        return value

    def _lookup(self, pattern: dict[str, float], module: str, key: str) -> float:
        for name, value in pattern.items():
            try:
                if re.match(rf"(.*\.)?({name})$", module):
                    return value
            except re.error:
                raise RunError(
                    "a pattern is not a regular expression", file=self._path, found=name
                ) from None
        default = self._config.get(key)
        if not _is_number(default):
            raise RunError(
                f"{key} is missing or not a number",
                file=self._path,
                found=default,
                remedy="pass --lora-alpha" if key == "lora_alpha" else None,
            )
        return default

    def of(self, module: str, rank: int) -> float:
        said = self._lookup(self._rank_pattern, module, "r")
        if said != rank:
            raise RunError(
                "the stored rank differs from the configuration's",
                file=self._path,
                tensor=module,
                found=f"rank {rank} in the weights",
                expected=f"rank {said} by r and rank_pattern",
                remedy="is this the adapter_config.json of another adapter?",
            )
        if self._alpha is not None:
            alpha = self._alpha
        else:
            alpha = self._lookup(self._alpha_pattern, module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _loader(parts: dict[str, LazyTensor], scale: float, embedding: bool) -> Callable[[], Update]:
    def load() -> Update:
        a, b = load_finite(parts["A"]), load_finite(parts["B"])
        update = RankOneSum(a, torch.full((a.shape[0],), scale), b)
        # ΔE = (B·A)ᵀ for an embedding stored as [vocab, dim].
        return update.transposed() if embedding else update

    return load


def _num_labels(replaced: dict[str, LazyTensor]) -> int | None:
    heads = [t for name, t in replaced.items() if name.endswith(".weight") and len(t.shape) == 2]
    return heads[-1].shape[0] if heads else None
