"""The adapters loaded beside one ONNX graph, and what the graph is fed for those in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.onnx_files import (
    FOLDER,
    LABELS,
    LOGITS_POSITIONS,
    SUFFIX,
    head_names,
    heads_in,
    names,
    read_adapter_file,
)

from .session import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class AdapterSet:
    """Adapters by name. `session`: of either form of the graph. `own`: the base's heads."""

    def __init__(self, session: Any, own: Mapping[str, Array] | None = None) -> None:
        # An input with a default, as those of the adapters are, counts as an initializer.
        shapes = {value.name: list(value.shape) for value in session.get_overridable_initializers()}
        self._sites = [n.removesuffix(".lora_A") for n in shapes if n.endswith(".lora_A")]
        self.heads = heads_in(shapes)
        self.batched = any(name.endswith(".lora_owner") for name in shapes)
        if self.batched:  # a stack of heads: one adapter brings one of them
            stacks = {name for module in self.heads for name in head_names(module)}
            shapes = {n: shape[1:] if n in stacks else shape for n, shape in shapes.items()}
        others = (LOGITS_POSITIONS, *(name for name in shapes if name.endswith(".lora_owner")))
        self._shapes = {n: s for n, s in shapes.items() if n not in others}
        self._own = dict(own or {})
        self._loaded: dict[str, dict[str, Array]] = {}
        self._stacks: dict[tuple[str, ...], dict[str, Array]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def add_all(self, folder: Path) -> None:
        """Load every adapter that lies beside the graph."""
        for path in sorted((folder / FOLDER).glob(f"*{SUFFIX}")):
            self.add(path.name.removesuffix(SUFFIX), path)

    def add(self, name: str, path: Path) -> None:
        """Load an `.onnx_adapter` file under `name`, in place of an earlier one of that name.

        Raises `EngineError` when it does not fit the graph, `TensorFileError` when it is damaged.
        """
        parameters = read_adapter_file(path)
        sizes: dict[str, set[int]] = {}
        for parameter, array in parameters.items():
            shape = self._shapes.get(parameter)
            if shape is None or not _fits(array, shape):
                raise EngineError(
                    "the adapter does not fit this graph",
                    file=path,
                    tensor=parameter,
                    found=list(array.shape),
                    expected=shape or "no such input",
                    remedy="was it made for another base? add it with dora-export onnx --add",
                )
            if not np.isfinite(array).all():  # a row's zero times infinity would reach the others
                raise EngineError(
                    "the adapter holds numbers that are not finite",
                    file=path,
                    tensor=parameter,
                    remedy="the run diverged or the file is damaged: add another",
                )
            for size, symbol in zip(array.shape, shape, strict=True):
                if isinstance(symbol, str):
                    sizes.setdefault(symbol, set()).add(size)
        for site in self._sites:
            given = {name for name in names(site)[:2] if name in parameters}
            if len(given) == 1:
                sizes[f"{site}.rank"] = {0, 1}
        for symbol, found in sizes.items():
            if len(found) > 1:
                raise EngineError(
                    "two parts of the adapter are of different size",
                    file=path,
                    tensor=symbol.rpartition(".")[0],
                    found=sorted(found),
                    expected=f"one {symbol.rpartition('.')[2]}",
                    remedy="the file is damaged: add the adapter again",
                )
        self._loaded[name] = parameters
        self._stacks.clear()

    def remove(self, name: str) -> None:
        """Forget an adapter; the graph and the session stay as they are."""
        self.check([name])
        del self._loaded[name]
        self._stacks.clear()

    def check(self, wanted: Sequence[str | None]) -> None:
        """Raise `EngineError` for a name that is not loaded."""
        for name in wanted:
            if name is not None and name not in self._loaded:
                known = ", ".join(self._loaded) or "none"
                raise EngineError("no such adapter", found=name, expected=known)

    def labels(self, name: str | None) -> int | None:
        """How many labels the head of an adapter (None: of the base) has; None without such."""
        for module in self.heads:
            weight = head_names(module)[0]
            if str(self._shapes[weight][-1]).endswith(f".{LABELS}"):
                return int(self._part(name, weight).shape[-1])
        return None

    def _part(self, name: str | None, parameter: str) -> Array:
        own = self._own[parameter]
        return own if name is None else self._loaded[name].get(parameter, own)

    def single(self, name: str | None) -> dict[str, Array]:
        """The inputs of the single form for one adapter, or for none."""
        return {} if name is None else self._loaded[name]

    def stacked(self, used: tuple[str, ...]) -> dict[str, Array]:
        """The inputs of the batched form: an adapter's index is its place in `used`.

        The same object as before as long as neither `used` nor what is loaded changes.
        """
        found = self._stacks.get(used)
        if found is None:
            found = {**self._branches(used), **self._heads(used)}
            if len(used) > 1:  # a copy of its adapters, so that only one such stack is kept
                for other in [stack for stack in list(self._stacks) if len(stack) > 1]:
                    self._stacks.pop(other, None)
            self._stacks[used] = found
        return found

    def _branches(self, used: tuple[str, ...]) -> dict[str, Array]:
        feeds: dict[str, Array] = {}
        for site in self._sites:
            a, b, owner = names(site)
            present = [(i, self._loaded[n]) for i, n in enumerate(used) if a in self._loaded[n]]
            if present:
                ranks = [np.full(part[a].shape[1], i, np.int64) for i, part in present]
                feeds[a] = _joined([part[a] for _, part in present], axis=1)
                feeds[b] = _joined([part[b] for _, part in present], axis=0)
                feeds[owner] = np.concatenate(ranks)
        return feeds

    def _heads(self, used: tuple[str, ...]) -> dict[str, Array]:
        """Every head once per adapter in use, the base's own last; missing labels are -inf."""
        feeds = {}
        for parameter in self._own if used else ():
            parts = [self._part(name, parameter) for name in (*used, None)]
            most = max(part.shape[-1] for part in parts)
            filler = 0.0 if parts[0].ndim == 2 else -np.inf
            feeds[parameter] = np.stack(
                [
                    np.pad(
                        part,
                        [(0, 0)] * (part.ndim - 1) + [(0, most - part.shape[-1])],
                        constant_values=filler,
                    )
                    for part in parts
                ]
            )
        return feeds


def _joined(parts: Sequence[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def _fits(array: Array, shape: Sequence[int | str]) -> bool:
    return array.ndim == len(shape) and all(
        isinstance(size, str) or size == actual
        for size, actual in zip(shape, array.shape, strict=True)
    )
