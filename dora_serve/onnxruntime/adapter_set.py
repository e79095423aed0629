"""The adapters loaded beside a model's graphs, and what the graphs are fed for those in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.onnx_files import (
    ADAPTER_INDEX,
    FOLDER,
    LABELS,
    LOGITS_POSITIONS,
    NO_ADAPTER,
    ROW_LENGTHS,
    SUFFIX,
    digest,
    head_names,
    heads_in,
    names,
    read_adapter_file,
)

from .session import EngineError, OnnxFolder, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


# One adapter for all rows, or one for each; None is none.
Adapters = Sequence[str | None] | str | None


class AdapterSet:
    """Adapters by name. `sessions`: of either form of the graphs. `own`: the base's heads."""

    def __init__(self, sessions: Sequence[Session], own: Mapping[str, Array] | None = None) -> None:
        shapes = {n: shape for session in sessions for n, shape in session.defaults.items()}
        self._sites = [n.removesuffix(".lora_A") for n in shapes if n.endswith(".lora_A")]
        self.heads = heads_in(shapes)
        self.batched = any(name.endswith(".lora_owner") for name in shapes)
        if self.batched:  # a stack of heads: one adapter brings one of them
            stacks = {name for module in self.heads for name in head_names(module)}
            shapes = {n: shape[1:] if n in stacks else shape for n, shape in shapes.items()}
        others = {LOGITS_POSITIONS, ROW_LENGTHS, ADAPTER_INDEX}
        others |= {names(site)[2] for site in self._sites}
        self._shapes = {n: shape for n, shape in shapes.items() if n not in others}
        self._own = dict(own or {})
        self._loaded: dict[str, dict[str, Array]] = {}
        self._digests: dict[str, bytes] = {}
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
        self._digests.pop(name, None)
        self._stacks.clear()

    def remove(self, name: str) -> None:
        """Forget an adapter; the graphs and the sessions stay as they are."""
        self._check([name])
        del self._loaded[name]
        self._digests.pop(name, None)
        self._stacks.clear()

    def digest(self, name: str | None) -> bytes:
        """SHA-256 of what was loaded under `name`; of nothing for no adapter."""
        self._check([name])
        if name is None:
            return sha256().digest()
        if name not in self._digests:
            self._digests[name] = digest(self._loaded[name])
        return self._digests[name]

    def _check(self, wanted: Iterable[str | None]) -> None:
        for name in wanted:
            if name is not None and name not in self._loaded:
                known = ", ".join(self._loaded) or "none"
                raise EngineError("no such adapter", found=name, expected=known)

    def per_row(self, adapters: Adapters, rows: int) -> list[str | None]:
        """The adapter of every row. Raises `EngineError` for a name that is not loaded, and for
        other than one name per row."""
        if adapters is None or isinstance(adapters, str):
            adapters = [adapters] * rows
        wanted = list(adapters)
        if len(wanted) != rows:
            raise EngineError("one adapter (or None) per row", found=len(wanted), expected=rows)
        self._check(wanted)
        return wanted

    def feeds(self, wanted: Sequence[str | None]) -> dict[str, Array]:
        """The inputs for rows with these adapters; all the same in the form for one at a time."""
        used = tuple(dict.fromkeys(name for name in wanted if name is not None))
        if self.batched:
            return {**self.stacked(used), ADAPTER_INDEX: row_index(wanted, used)}
        if len(set(wanted)) > 1:
            raise EngineError("this graph takes one adapter at a time", found=", ".join(used))
        return self._loaded[used[0]] if used else {}

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
            shape = (*parts[0].shape[:-1], max(part.shape[-1] for part in parts))
            missing = 0.0 if parts[0].ndim == 2 else -np.inf
            feeds[parameter] = np.full((len(parts), *shape), missing, parts[0].dtype)
            for stacked, part in zip(feeds[parameter], parts, strict=True):
                stacked[..., : part.shape[-1]] = part
        return feeds


def _joined(parts: Sequence[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def _fits(array: Array, shape: Sequence[int | str]) -> bool:
    return array.ndim == len(shape) and all(
        isinstance(size, str) or size == actual
        for size, actual in zip(shape, array.shape, strict=True)
    )


def row_index(wanted: Sequence[str | None], used: Sequence[str]) -> NDArray[np.int64]:
    """Which of the adapters side by side each row has."""
    return np.array([NO_ADAPTER if n is None else used.index(n) for n in wanted], np.int64)


class AdaptedFolder(OnnxFolder):
    """A folder whose adapters come and go while its graphs and sessions stay as they are."""

    adapter_set: AdapterSet

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.adapter_set.names

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an `.onnx_adapter` file under `name`, in place of an earlier one of that name."""
        self.adapter_set.add(name, Path(path))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self.adapter_set.remove(name)
