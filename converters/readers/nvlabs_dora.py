"""Weight-decomposed DoRA of its authors' PEFT fork (NVlabs/DoRA, `peft/src/peft/tuners/dora.py`).

W' = (m / ‖W + s·BA‖) ⊙ (W + s·BA) with s = lora_alpha/r; where only the magnitude was trained
(`Wdecompose_target_modules`), W' = (m / ‖W‖) ⊙ W. Only linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite
from ..run import LazyUpdates, Run
from ..updates.magnitude import MagnitudeUpdate
from ..updates.rank_one import RankOneSum
from ..updates.update import Update
from . import ReadOptions
from .peft_common import (
    CONFIG_FILE,
    WEIGHT_FILES,
    Scaling,
    check_pair,
    grouped,
    linear_shape,
    need_base,
    open_weights,
    origin,
    read_config,
    refuse_unread,
)

_PART = re.compile(r"(.+)\.(?:lora_(A|B)|weight_(m)_wdecomp)\.weight")


class NvlabsDoraReader:
    """Reads an adapter folder."""

    name = "nvlabs_dora"
    looks_for = f'{CONFIG_FILE} with peft_type "DORA", and {" or ".join(WEIGHT_FILES)}'

    def detect(self, path: Path) -> Path | None:
        return path if read_config(path).get("peft_type") == "DORA" else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        config, config_path = read_config(folder), folder / CONFIG_FILE
        file, tensors = open_weights(folder)
        modules, replaced = grouped(tensors, _PART)
        refuse_unread(replaced, file)
        scaling = Scaling(config, config_path, options)
        updates: dict[str, Callable[[], Update]] = {}
        start_rank = {}
        for module, parts in modules.items():
            if parts.keys() == {"m"}:
                base = need_base(options, "a module of which only the magnitude was trained", file)
                shape = linear_shape(base, module)
                start_rank[module], scale = 0, 0.0
            else:
                start_rank[module] = check_pair(module, parts, file)
                shape = (parts["B"].shape[0], parts["A"].shape[1])
                scale = scaling.of(module, start_rank[module])
            _check_magnitude(module, parts, shape, file)
            updates[module] = _loader(parts, shape, scale)
        return Run(
            path=folder,
            method=self.name,
            updates=LazyUpdates(updates),
            replaced=replaced,
            **origin(config, replaced),
            start_rank=start_rank,
            files=(file, config_path),
        )


def _check_magnitude(
    module: str, parts: dict[str, LazyTensor], shape: tuple[int, int], file: Path
) -> None:
    name = f"{module}.weight_m_wdecomp.weight"
    if "m" not in parts:
        raise RunError(
            "a module has no magnitude",
            file=file,
            tensor=name,
            expected=f"[{shape[0]}, 1]",
            remedy='the fork does not save magnitudes with bias "lora_only"; without them the '
            "trained model cannot be told",
        )
    if parts["m"].shape != (shape[0], 1):
        raise RunError(
            "the magnitude does not fit the module",
            file=file,
            tensor=name,
            found=list(parts["m"].shape),
            expected=[shape[0], 1],
        )


def _loader(
    parts: dict[str, LazyTensor], shape: tuple[int, int], scale: float
) -> Callable[[], Update]:
    def load() -> Update:
        if "A" in parts:
            a, b = load_finite(parts["A"]), load_finite(parts["B"])
        else:
            a, b = torch.zeros(0, shape[1]), torch.zeros(shape[0], 0)
        delta = RankOneSum(a, torch.full((a.shape[0],), scale), b)
        return MagnitudeUpdate(load_finite(parts["m"]).squeeze(1), delta)

    return load
