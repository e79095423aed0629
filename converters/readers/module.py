"""One adapted module of a run that stores LoRA's factors: the tensors beside one another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import RunError
from ..files.tensors import LazyTensor, LazyTensors, load_finite, numel
from ..updates.rank_one import RankOneSum

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.weight)?")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_[AB]")
_OWN = {"weight", "bias", "base_layer"}  # what an adapted layer has by itself


@dataclass
class AdaptedModule:
    """`parts`: `A`, `B` and whatever else the method stores, by the method's names for it."""

    name: str
    parts: dict[str, LazyTensor] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).path

    def pair(self, names: tuple[str, str] = ("lora_A", "lora_B")) -> int:
        """The rank of A `[r, in]` and B `[out, r]`, which the method stores under `names`; those
        of a convolution are `[r, in, *kernel]` and `[out, r, 1, …]`. Raises `RunError` when they do
        not fit each other."""
        for part, name in zip("AB", names, strict=True):
            if part not in self.parts:
                raise self.incomplete(name, " and ".join(names))
        a, b = self.parts["A"], self.parts["B"]
        matrices = len(a.shape) == len(b.shape) >= 2 and set(b.shape[2:]) <= {1}
        groups, left = divmod(a.shape[0], b.shape[1] or 1) if matrices else (1, 0)
        if self.kernel and groups > 1 and not left:
            raise self.error(
                "a convolution in groups, whose weight cannot hold the update: "
                f"{names[0]} reads the channels of all groups",
                names[1],
                found=f"{groups} groups",
                remedy="serve it with PEFT on its base: PeftModel.from_pretrained(base, adapter)",
            )
        if not matrices or a.shape[0] != b.shape[1]:
            raise self.error(
                f"{' and '.join(names)} are of different rank (or not of linear layers)",
                names[1],
                found=list(b.shape),
                expected=f"[out, r] beside {names[0]} [r, in] {list(a.shape)}",
            )
        return a.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """`[in, *kernel]` of a convolution, empty of a linear layer."""
        shape = self.parts["A"].shape if "A" in self.parts else ()
        return shape[1:] if len(shape) > 2 else ()

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]` of the weight that the pair is for, a convolution's seen as a matrix."""
        return self.parts["B"].shape[0], math.prod(self.parts["A"].shape[1:])

    def need(self, part: str, size: int, expected: str) -> None:
        """Raise `RunError` unless `part` is there and holds `size` numbers; `expected` says what a
        whole module has."""
        if part not in self.parts:
            raise self.incomplete(part, expected)
        self.check_size(part, size)

    def check_size(self, part: str, size: int) -> None:
        """Raise `RunError` unless `part` is a vector of `size` numbers, lying or standing."""
        tensor = self.parts[part]
        if numel(tensor) != size or (size and max(tensor.shape, default=1) != size):
            raise self.error(
                f"{part} does not fit the module's other tensors",
                part,
                found=list(tensor.shape),
                expected=f"{size} numbers, as [{size}]: one per component",
            )

    def incomplete(self, part: str, expected: str) -> RunError:
        names = ", ".join(sorted(tensor.name for tensor in self.parts.values()))
        message = "an adapted module is incomplete"
        return self.error(message, part, found=f"only {names}", expected=expected)

    def error(
        self,
        message: str,
        part: str,
        *,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> RunError:
        """An error about one part of the module, by the method's name for it."""
        tensor = f"{self.name}.{part}"
        return RunError(
            message, file=self.file, tensor=tensor, found=found, expected=expected, remedy=remedy
        )

    def load(self, part: str) -> torch.Tensor:
        """The data of a part, float32, finite."""
        return load_finite(self.parts[part])

    def sum(self, scale: float, weights: str | None = None) -> RankOneSum:
        """ΔW = scale·B·diag(weights)·A from tensor data."""
        a, b = self.load("A").flatten(1), self.load("B").flatten(1)
        c = self.load(weights).flatten() if weights else torch.ones(a.shape[0])
        # float64 for the product, so that scale·c is rounded once.
        return RankOneSum(a, (c.double() * scale).float(), b)


Modules = Mapping[str, AdaptedModule]


def grouped(
    tensors: LazyTensors, pattern: re.Pattern[str], parts: Mapping[str, str] | None = None
) -> tuple[dict[str, AdaptedModule], dict[str, LazyTensor]]:
    """Module name → module, for the tensors whose names match `pattern`: its first group is the
    module, its last that matched the part, which `parts` may give another name. And the tensors
    whose names do not."""
    modules: dict[str, AdaptedModule] = {}
    rest = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            module = modules.setdefault(match[1], AdaptedModule(match[1]))
            part = match[match.lastindex or 0]
            module.parts[(parts or {}).get(part, part)] = tensor
        else:
            rest[name] = tensor
    return modules, rest


def adapted(tensors: LazyTensors) -> dict[str, AdaptedModule]:
    """The modules with `lora_A` or `lora_B`; all other tensors beside these are parts by their own
    names."""
    modules, rest = grouped(tensors, _FACTOR)
    for name, tensor in rest.items():
        for stem in (name, name.removesuffix(".weight")):
            module, _, part = stem.rpartition(".")
            if module in modules and part not in _OWN and not part.startswith(("lora_A", "lora_B")):
                modules[module].parts[part] = tensor
    return modules


def with_factors(tensors: LazyTensors) -> list[str]:
    """The modules with factors, embeddings among them, by the names of what they wrap."""
    embeddings = [match[1] for name in tensors if (match := _EMBEDDING.fullmatch(name))]
    names = [*adapted(tensors), *embeddings]
    return list(dict.fromkeys(name.partition(".base_layer")[0] for name in names))
