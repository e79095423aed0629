"""What the adapter folders of PEFT and its forks have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from ..errors import BaseError, MissingError, RunError
from ..files.tensors import LazyTensor, LazyTensors, open_file, read_json
from ..model.base import CONV1D_FAMILIES, CONV1D_LAYERS, BaseModel, open_base
from ..model.tasks import task_of_peft
from . import ReadOptions
from . import is_number as is_number
from .dora import HEAD_WEIGHTS
from .patterns import PatternError, Patterns

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."

# With bias="all" PEFT also saves the wrapper's copies of a head it saves under its own name; in a
# state dict as the model has it there is only the wrapper's.
_ORIGINAL, _SAVED = ".original_module.", re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


def read_config(folder: Path) -> dict[str, object]:
    """`adapter_config.json` of `folder` (or beside a file), empty where there is none."""
    file = (folder.parent if folder.is_file() else folder) / CONFIG_FILE
    return read_json(file) if file.is_file() else {}


def open_weights(folder: Path) -> tuple[Path, dict[str, LazyTensor]]:
    """The adapter's weight file, and its tensors by name without PEFT's prefix.

    `folder` may be the file itself, where a run has several.
    """
    files = [folder, *(folder / name for name in WEIGHT_FILES)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MissingError(
            "the adapter has no weights", file=folder, expected=" or ".join(WEIGHT_FILES)
        )
    names = {name.removeprefix(_PREFIX): tensor for name, tensor in open_file(file).items()}
    saved = {_SAVED.sub("", name): tensor for name, tensor in names.items() if _SAVED.search(name)}
    own = {n: t for n, t in names.items() if _ORIGINAL not in n and not _SAVED.search(n)}
    return file, {**saved, **own}


class Origin(TypedDict):
    """The fields of a `Run` that say what it was trained on, and for what."""

    base: str | None
    task: str | None
    num_labels: int | None


def origin(config: dict[str, object], replaced: dict[str, LazyTensor]) -> Origin:
    """Base model and task as the configuration names them."""
    task = task_of_peft(config.get("task_type"))
    base = config.get("base_model_name_or_path")
    return {
        "base": str(base) if base else None,
        "task": task,
        "num_labels": _num_labels(replaced) if str(task).endswith("classification") else None,
    }


def refuse_unread(replaced: Iterable[str], file: Path) -> None:
    """Raise `RunError` for a tensor of an adapter that would be taken for one trained whole."""
    for name in replaced:
        if "lora_" in name:
            raise RunError(
                "a part of the adapter that this reader does not read",
                file=file,
                tensor=name,
                expected="adapters on linear layers only, under the names PEFT saves",
                remedy="where an adapter's name is in the tensors' names: `lint` with `fix`",
            )


def need_base(options: ReadOptions, what: str, file: Path) -> BaseModel:
    """The base model the user names, for `what` cannot be read without it."""
    if options.base is None:
        raise RunError(
            f"{what} cannot be read without the base model, whose shapes it takes",
            file=file,
            remedy="pass the base with `base`, a folder or a hub id",
        )
    return open_base(options.base)


def linear_shape(base: BaseModel, module: str) -> tuple[int, int]:
    """`[out, in]` of a linear layer of the base, or of a Conv1D, which is stored as `[in, out]`."""
    weight = base.weight(module)
    if weight is None or len(weight.shape) != 2:
        raise BaseError(
            "the base has no such linear layer",
            file=base.path,
            tensor=f"{module}.weight",
            found=None if weight is None else list(weight.shape),
            remedy="is this the base the run was trained on? pass it with `base`",
        )
    rows, columns = weight.shape
    conv1d = base.config.get("model_type") in CONV1D_FAMILIES
    if conv1d and module.rsplit(".", 1)[-1] in CONV1D_LAYERS:
        return columns, rows
    return rows, columns


def check_pair(module: str, parts: dict[str, LazyTensor], file: Path) -> int:
    """The rank of a module's lora_A and lora_B; raises `RunError` when they do not fit."""
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
            expected=f"[out, r] beside lora_A [r, in] {list(a.shape)}",
        )
    return a.shape[0]


class Scaling:
    """Each module's scale, alpha/r or alpha/√r, by the patterns of the configuration."""

    def __init__(self, config: dict[str, object], path: Path, options: ReadOptions) -> None:
        self._path = path
        self._config = config
        self._alpha = options.lora_alpha
        self._patterns_in = Patterns()
        self._rank_pattern = self._patterns("rank_pattern")
        self._alpha_pattern = self._patterns("alpha_pattern")

    def _patterns(self, key: str) -> dict[str, float]:
        value = self._config.get(key) or {}
        if not isinstance(value, dict) or not all(is_number(n) for n in value.values()):
            raise RunError(f"{key} is not a map of numbers", file=self._path, found=value)
        return value

    def _lookup(self, pattern: dict[str, float], module: str, key: str) -> float:
        for name, value in pattern.items():
            try:
                if self._patterns_in.suffix(name, module):
                    return value
            except PatternError as error:
                raise RunError(str(error), file=self._path, found=name) from None
        default = self._config.get(key)
        if not is_number(default):
            raise RunError(
                f"{key} is missing or not a number",
                file=self._path,
                found=default,
                remedy="pass `lora_alpha`" if key == "lora_alpha" else None,
            )
        return default

    def rank(self, module: str) -> float:
        """The rank that the configuration gives `module`."""
        return self._lookup(self._rank_pattern, module, "r")

    def of(self, module: str, rank: int) -> float:
        """The scale of `module`, whose stored rank is `rank`."""
        said = self.rank(module)
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
        if not rank:
            return 0.0
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def grouped(
    tensors: LazyTensors, pattern: re.Pattern[str]
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """Module → part → tensor, for the names that match `pattern`, whose first group is the module
    and whose only other group that matched is the part; and the tensors whose names do not."""
    modules: dict[str, dict[str, LazyTensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            modules.setdefault(match[1], {})[match[match.lastindex or 0]] = tensor
        else:
            rest[name] = tensor
    return modules, rest


def _num_labels(replaced: dict[str, LazyTensor]) -> int | None:
    heads = [t for name, t in replaced.items() if name.endswith(".weight") and len(t.shape) == 2]
    known = [replaced[name] for name in HEAD_WEIGHTS if name in replaced and replaced[name].shape]
    return (known or heads[::-1])[0].shape[0] if heads else None
