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

import torch

from ..errors import RunError
from ..options import ReadOptions
from ..run import Run
from ..updates.rank_one import RankOneSum
from ..updates.rotated import rotated
from ..updates.update import Update
from .lora_reader import Adaptation, AdapterFiles
from .module import AdaptedModule, grouped
from .peft_common import Scaling, linear_shape, need_base
from .run_folder import CONFIG_FILE, WEIGHT_FILES, RunFolder

_PART = re.compile(r"(.+)\.lora_(A|B)\.weight")
_TYPES = (1, 2, 3, 4, 6)


class MoraReader:
    """Reads an adapter folder."""

    name = "mora"
    looks_for = f'{CONFIG_FILE} with "use_mora": true, and {" or ".join(WEIGHT_FILES)}'

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if folder.adapter_config.get("use_mora") else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:
        files = AdapterFiles(folder)
        config, path = files.config, files.config_path
        kind = config.get("mora_type", 1)
        if not isinstance(kind, int) or kind not in _TYPES or config.get("use_dora"):
            raise RunError(
                "this kind of MoRA cannot be read",
                file=path,
                found=f"mora_type {kind}, use_dora {config.get('use_dora')}",
                expected=f"mora_type {', '.join(map(str, _TYPES))}, without use_dora",
            )
        base = need_base(options, "MoRA", path)
        scaling = Scaling(config, path, options)

        def adapt(module: AdaptedModule) -> Adaptation:
            shape = linear_shape(base, module.name)
            size = _size(module, shape, scaling.rank(module.name), kind)
            return Adaptation(size, lambda: _update(module, kind, shape), shape)

        return files.run(self.name, grouped(files.tensors, _PART)[0], adapt)


def _size(module: AdaptedModule, shape: tuple[int, int], rank: float, kind: int) -> int:
    """n, the size of the trained matrix, which must be what `rank` gives for the weight."""
    size = module.pair()
    a, b = module.parts["A"], module.parts["B"]
    if a.shape != (size, size) or b.shape != (size, size):
        raise module.error(
            "the matrix of a module is not square",
            "lora_A",
            found=f"{list(a.shape)} beside lora_B {list(b.shape)}",
            expected="a square lora_A, and the same again as lora_B",
        )
    expected = int(math.sqrt(sum(shape) * rank) + 0.5)
    if kind == 6:
        expected -= expected % 2
    if size != expected:
        raise module.error(
            "the matrix of a module does not fit the base weight",
            "lora_A",
            found=[size, size],
            expected=f"{[expected, expected]} for r {rank} and a weight {list(shape)}",
            remedy="is this the base the run was trained on? pass it with `base`",
        )
    return size


def _update(module: AdaptedModule, kind: int, shape: tuple[int, int]) -> Update:
    matrix, other = module.load("A"), module.load("B")
    coarse = min((module.parts[part].dtype for part in "AB"), key=lambda dtype: dtype.itemsize)
    if not torch.equal(matrix.to(coarse), other.to(coarse)):
        message = "lora_A and lora_B differ, but MoRA trains one matrix"
        raise module.error(message, "lora_B", remedy="was the adapter changed after training?")
    return rotated(matrix, shape) if kind == 6 else _folded(matrix, kind, shape)


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
