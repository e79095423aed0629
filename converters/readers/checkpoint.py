"""What the readers of LoRA's relatives share: tensors named as in loralib, `X.lora_A` and so on.

They lie in an adapter folder, or in a checkpoint with config.json and the weights of the whole
model (or of what was trained), whose frozen weights tell whether a base is the right one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, LazyTensors, load_finite, numel
from ..model.base import INDEX_FILES, SINGLE_FILES, BaseModel, open_base
from ..model.tasks import task_of
from ..run import LazyUpdates, Run
from ..updates.rank_one import RankOneSum
from . import is_number
from .peft_common import CONFIG_FILE, WEIGHT_FILES, open_weights, origin, read_config

Parts = dict[str, LazyTensor]

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.weight)?")
_OWN = {"weight", "bias", "base_layer"}  # what an adapted layer has by itself

# Constants that older versions of transformers saved; its present models do not know them.
_BUFFER = re.compile(r".*\.(position_ids|masked_bias|rotary_emb\.inv_freq)")
_HEAD = re.compile(r"(classifier|classification_head|score)\.(out_proj\.)?weight")


def open_checkpoint(folder: Path) -> BaseModel | None:
    """The model folder as transformers saves it, None where `folder` is none."""
    files = ("config.json", *SINGLE_FILES, *INDEX_FILES)
    config, *weights = ((folder / name).is_file() for name in files)
    return open_base(folder) if config and any(weights) else None


def adapted(tensors: LazyTensors) -> dict[str, Parts]:
    """Module → its parts: `A`, `B` and, by their own names, all other tensors beside these."""
    modules: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = tensor
    for name, tensor in tensors.items():
        for stem in (name, name.removesuffix(".weight")):
            module, _, part = stem.rpartition(".")
            if module in modules and part not in _OWN and not part.startswith(("lora_A", "lora_B")):
                modules[module][part] = tensor
    return modules


def more_than_lora(folder: Path) -> bool:
    """Whether an adapter folder holds other tensors beside lora_A and lora_B."""
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        return False
    return any(parts.keys() - {"A", "B"} for parts in adapted(open_weights(folder)[1]).values())


def check_size(module: str, part: str, tensor: LazyTensor, size: int) -> None:
    """Raise `RunError` unless `tensor` holds `size` numbers."""
    if numel(tensor) != size:
        raise RunError(
            f"{part} does not fit the module's other tensors",
            file=tensor.path,
            tensor=f"{module}.{part}",
            found=list(tensor.shape),
            expected=f"{size} numbers",
        )


def number(
    config: Mapping[str, object], path: Path, keys: tuple[str, ...], said: float | None, option: str
) -> float:
    """What the user `said`, else the first of `keys` in the configuration; it must be positive."""
    value = said if said is not None else next((config[k] for k in keys if k in config), None)
    if not is_number(value) or value <= 0:
        raise RunError(
            f"the run's {keys[0]} is not known",
            file=path,
            found=f"{value}",
            expected=f"a positive number as {' or '.join(keys)}",
            remedy=f"pass `{option}`",
        )
    return value


def weighted(parts: Parts, weights: str | None, scale: float) -> RankOneSum:
    """ΔW = scale·B·diag(weights)·A from tensor data."""
    a, b = load_finite(parts["A"]), load_finite(parts["B"])
    c = load_finite(parts[weights]).flatten() if weights else torch.ones(a.shape[0])
    # float64 for the product, so that scale·c is rounded once.
    return RankOneSum(a, (c.double() * scale).float(), b)


def adapter_run(
    folder: Path,
    method: str,
    parts: Mapping[str, Parts],
    updates: Mapping[str, Callable[[], RankOneSum]],
    start_rank: Mapping[str, int],
    options: Mapping[str, object],
) -> Run:
    """The run of an adapter folder whose adapted modules have these parts."""
    file, tensors = open_weights(folder)
    own = {tensor.name for tensors in parts.values() for tensor in tensors.values()}
    whole = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if tensor.name not in own
    }
    # An adapter on a head may carry its untouched base weight along.
    replaced = {
        name: tensor for name, tensor in whole.items() if name.removesuffix(".weight") not in parts
    }
    return Run(
        path=folder,
        method=method,
        updates=LazyUpdates(updates),
        replaced=replaced,
        **origin(read_config(folder), replaced),
        start_rank=start_rank,
        files=(file, folder / CONFIG_FILE),
        options=options,
    )


def checkpoint_run(
    checkpoint: BaseModel,
    method: str,
    parts: Mapping[str, Parts],
    updates: Mapping[str, Callable[[], RankOneSum]],
    start_rank: Mapping[str, int],
    options: Mapping[str, object],
) -> Run:
    """The run of a checkpoint whose adapted modules have these parts.

    Every other tensor counts as trained; a writer drops those that equal the base's.
    """
    own = {tensor.name for tensors in parts.values() for tensor in tensors.values()}
    rest = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name not in own and tensor.dtype.is_floating_point and not _BUFFER.fullmatch(name)
    }
    frozen = {f"{module}.weight" for module in parts}
    task = task_of(checkpoint.config)
    heads = [tensor.shape[0] for name, tensor in rest.items() if _HEAD.fullmatch(name)]
    name = checkpoint.config.get("_name_or_path")
    return Run(
        path=checkpoint.path,
        method=method,
        updates=LazyUpdates(updates),
        replaced={name: tensor for name, tensor in rest.items() if name not in frozen},
        embedded_base=rest if frozen <= rest.keys() else None,
        base=str(name) if name else None,
        task=task,
        num_labels=heads[-1] if heads and task == "sequence-classification" else None,
        start_rank=start_rank,
        files=(*checkpoint.shards, checkpoint.path / "config.json"),
        options=options,
    )
