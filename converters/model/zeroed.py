"""Rows that a class sets to zero whenever it is loaded, whatever its file holds: of some classes
the padding's row of an embedding.

transformers initializes what a file lacks, and leaves alone what was loaded by a mark on each
parameter; a part of one, such as a row, has no mark. Where the classes do so is not listed here:
an empty model of the class is initialized with all marks set, and what is written is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TargetError
from ..files.tensors import LazyTensor, rows_and_columns
from ..run import Run
from .base import BaseModel
from .names import Names
from .untying import in_every_layer

Rows = tuple[int, ...]


def zeroed_rows(
    base: BaseModel, architecture: str | None, num_labels: int | None
) -> Mapping[str, Rows]:
    """Parameter in memory → the rows of it that are zero in every model of the class that is loaded
    from a file which holds it. None of a class that transformers does not know."""
    known = Names(base, architecture, num_labels).model
    return {} if known is None else _zeroed_in(known)


@lru_cache(maxsize=8)
def _zeroed_in(known: Any) -> Mapping[str, Rows]:
    model = deepcopy(known)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, kind = name.rpartition(".")
        alone = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
        setattr(model.get_submodule(owner), kind, alone)  # ties are made when all is initialized
    watch = _Watch(model)
    with watch, suppress(Exception):  # of what has no values: the rest of the class is not asked
        model.initialize_weights()
    return {name: tuple(sorted(rows)) for name, rows in watch.found.items()}


class _Watch(TorchDispatchMode):
    """Watches which rows of a model's loaded tensors are set to zero. `found`: name → rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = dict(model.named_parameters())
        for tensor in own.values():
            tensor._is_hf_initialized = True
        self._own = {_storage(tensor): (name, tensor) for name, tensor in own.items()}
        self.found: dict[str, set[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Collection[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.zero_.default and _storage(args[0]) in self._own:
            name, whole = self._own[_storage(args[0])]
            columns = rows_and_columns(tuple(whole.shape))[1]
            start = args[0].storage_offset()
            rows = range(start // columns, (start + args[0].numel()) // columns)
            self.found.setdefault(name, set()).update(rows)
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def as_loaded(
    run: Run, base: BaseModel, architecture: str | None, find: Callable[[str], str | None]
) -> tuple[BaseModel, Mapping[str, Rows]]:
    """`base` with the values that its class has when it is loaded, and its `zeroed_rows`; as it is,
    and none, where `run` touches what every layer has a tensor of its own of. `find` gives the
    tensor on disk of a name in memory."""
    if in_every_layer((*run.updates, *run.replaced), base):
        return base, {}
    zeroed = zeroed_rows(base, architecture, run.num_labels)
    rows = {disk: rows for name, rows in zeroed.items() if (disk := find(name)) is not None}
    shards = {
        path: {n: _Zeroed.of(t, rows[n]) if n in rows else t for n, t in tensors.items()}
        for path, tensors in base.shards.items()
    }
    return (replace(base, shards=shards) if rows else base), zeroed


@dataclass(frozen=True)
class _Zeroed:
    """`tensor` with `rows` of zeros."""

    name: str
    tensor: LazyTensor
    rows: Rows

    @classmethod
    def of(cls, tensor: LazyTensor, rows: Rows) -> _Zeroed:
        return cls(tensor.name, tensor, rows)

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def load(self) -> torch.Tensor:
        whole = self.tensor.load().clone()
        whole.view(rows_and_columns(self.shape))[list(self.rows)] = 0
        return whole

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        self.tensor.read_into(buffer, start)
        columns = rows_and_columns(self.shape)[1]
        for row in self.rows:
            first, last = row * columns - start, (row + 1) * columns - start
            buffer[max(0, first) : max(0, last)] = 0


def check_zeroed(
    run: Run,
    zeroed: Mapping[str, Rows],
    written: Mapping[str, tuple[LazyTensor, str | None]],
    find: Callable[[str], str | None],
) -> None:
    """Raise `TargetError` where what is `written`, name → its source and the module of `run` whose
    update goes into it, has numbers in rows that are zero when it is loaded."""
    for name, rows in zeroed.items():
        found = written.get(name) or written.get(find(name) or "")
        if found is None:
            continue
        source, module = found
        weight = source.load().float().view(rows_and_columns(source.shape))
        if module is not None:
            weight = run.take(module).merge(weight, 0)
        largest = float(weight[list(rows)].abs().max())
        if largest:
            raise TargetError(
                "transformers sets rows of this tensor to zero whenever it loads the class, and "
                "the run gives them other numbers, so that no merged model can hold them",
                file=run.path,
                tensor=name,
                found=f"numbers up to {largest:.2g} in the rows {list(rows)}, the padding's",
                remedy="deploy it as an adapter (`adapter`)",
            )
