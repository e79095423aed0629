"""MoRA (Jiang et al. 2024, arXiv 2405.12130), as its authors' PEFT fork saves it (kongds/MoRA,
`peft-mora/src/peft/tuners/lora/layer.py`).

ΔW = D·M·C: C folds the input to n values, M `[n, n]` is trained, D spreads n values to the
output. By `mora_type`:

- 1: C sums inputs n apart, D tiles.       3: C sums neighbours, D tiles.
- 4: C sums inputs n apart, D repeats.     2: C sums neighbours, D repeats.
- 6: blocks of n inputs, each rotated by its number (RoPE), give blocks of n outputs, tiled.

All but type 6 are therefore sums of n rank-1 components: a LoRA adapter of rank n equals them.
lora_B is lora_A under another name. lora_alpha is not used, and the tensors do not tell how wide
the layer is, so the base is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, load_finite, same_values
from ..run import LazyUpdates, Run
from ..updates.dense import DenseUpdate
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

_PART = re.compile(r"(.+)\.lora_(A|B)\.weight")
_TYPES = (1, 2, 3, 4, 6)


class MoraReader:
    """Reads an adapter folder."""

    name = "mora"
    looks_for = f'{CONFIG_FILE} with "use_mora": true, and {" or ".join(WEIGHT_FILES)}'

    def detect(self, path: Path) -> Path | None:
        return path if read_config(path).get("use_mora") else None

    def read(self, folder: Path, options: ReadOptions) -> Run:
        config, config_path = read_config(folder), folder / CONFIG_FILE
        kind = config.get("mora_type", 1)
        if not isinstance(kind, int) or kind not in _TYPES or config.get("use_dora"):
            raise RunError(
                "this kind of MoRA cannot be read",
                file=config_path,
                found=f"mora_type {kind}, use_dora {config.get('use_dora')}",
                expected=f"mora_type {', '.join(map(str, _TYPES))}, without use_dora",
            )
        file, tensors = open_weights(folder)
        modules, rest = grouped(tensors, _PART)
        replaced = {name.replace(".base_layer.", "."): tensor for name, tensor in rest.items()}
        refuse_unread(replaced, file)
        base = need_base(options, "MoRA", file)
        scaling = Scaling(config, config_path, options)
        updates: dict[str, Callable[[], Update]] = {}
        start_rank = {}
        for module, parts in modules.items():
            start_rank[module] = _check(module, parts, file)
            shape = linear_shape(base, module)
            _check_size(start_rank[module], shape, scaling.rank(module), kind, parts["A"])
            updates[module] = partial(_load, parts, kind, shape)
        return Run(
            path=folder,
            method=self.name,
            updates=LazyUpdates(updates),
            replaced=replaced,
            **origin(config, replaced),
            start_rank=start_rank,
            files=(file, config_path),
        )


def _check(module: str, parts: dict[str, LazyTensor], file: Path) -> int:
    """n, the size of the trained matrix."""
    size = check_pair(module, parts, file)
    if parts["A"].shape != (size, size) or parts["B"].shape != (size, size):
        raise RunError(
            "the matrix of a module is not square",
            file=file,
            tensor=parts["A"].name,
            found=f"{list(parts['A'].shape)} beside lora_B {list(parts['B'].shape)}",
            expected="a square lora_A, and the same again as lora_B",
        )
    return size


def _check_size(
    size: int, shape: tuple[int, int], rank: float, kind: int, matrix: LazyTensor
) -> None:
    expected = int(math.sqrt(sum(shape) * rank) + 0.5)
    if kind == 6:
        expected -= expected % 2
    if size != expected:
        raise RunError(
            "the matrix of a module does not fit the base weight",
            file=matrix.path,
            tensor=matrix.name,
            found=list(matrix.shape),
            expected=f"{[expected, expected]} for r {rank} and a weight {list(shape)}",
            remedy="is this the base the run was trained on? pass it with `base`",
        )


def _load(parts: dict[str, LazyTensor], kind: int, shape: tuple[int, int]) -> Update:
    if not same_values(parts["A"], parts["B"]):
        raise RunError(
            "lora_A and lora_B differ, but MoRA trains one matrix",
            file=parts["B"].path,
            tensor=parts["B"].name,
            remedy="was the adapter changed after training?",
        )
    matrix = load_finite(parts["A"])
    return _rotated(matrix, shape) if kind == 6 else _folded(matrix, kind, shape)


def _folded(matrix: torch.Tensor, kind: int, shape: tuple[int, int]) -> RankOneSum:
    """Types 1 to 4: n components, a = M·C and b = D."""
    (out, inn), n = shape, matrix.shape[0]
    if kind in (1, 4):
        # The last n inputs are filled up from the first ones.
        padded = torch.arange(inn + -inn % n)
        fold, inputs = padded % n, padded % inn
    else:
        fold, inputs = _groups(inn, n), torch.arange(inn)
    spread = torch.arange(out) % n if kind in (1, 3) else _groups(out, n)
    a = torch.zeros(n, inn).index_add_(1, inputs, matrix[:, fold])
    return RankOneSum(a, torch.ones(n), torch.nn.functional.one_hot(spread, n).float())


def _groups(length: int, n: int) -> torch.Tensor:
    """The number of the group each position is in: n groups, the first `length mod n` one
    longer."""
    sizes = torch.full((n,), length // n)
    sizes[: length % n] += 1
    return torch.arange(n).repeat_interleave(sizes)


def _rotated(matrix: torch.Tensor, shape: tuple[int, int]) -> DenseUpdate:
    """Type 6: block b of ΔW is M with its columns rotated by RoPE at position b."""
    (out, inn), n = shape, matrix.shape[0]
    blocks = -(-inn // n)
    inverse = 1.0 / (10000 ** (torch.arange(0, n, 2).float() / n))
    angle = torch.outer(torch.arange(blocks).float(), inverse).repeat(1, 2).unsqueeze(1)
    half = n // 2
    turned = torch.cat([matrix[:, half:], -matrix[:, :half]], dim=1)
    rotated = matrix * angle.cos() + turned * angle.sin()  # [blocks, n, n]

    def rows(start: int, stop: int) -> torch.Tensor:
        position = torch.arange(start, stop) % min(out, blocks * n)
        block, row = position // n, position % n
        inputs = (block.unsqueeze(1) * n + torch.arange(n)) % inn
        return torch.zeros(stop - start, inn).scatter_add_(1, inputs, rotated[block, row])

    return DenseUpdate(shape, rows)
