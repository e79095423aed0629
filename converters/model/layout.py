"""Where the parameters of a transformers model lie in the base's files.

Most names in memory are names on disk. Where they are not (experts fused in memory, renamed or
moved modules, layouts of older versions), transformers' own conversion mapping says what becomes
of what: it is applied to tensors of row numbers, as loading applies it to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from ..errors import BaseError
from ..files.tensors import LazyTensor, load_finite, refuse_quantized, rows_and_columns
from ..run import LazyUpdates, Run
from ..updates.update import Update, convolution_matrix
from .base import BaseModel
from .names import Names
from .names import split_slice as split_slice
from .rejoined import Rejoined, rejoined
from .spread import Taken, spread

# The parameters of fused experts, and all in the order in which their module registers them: PEFT's
# wrappers nest by it, the first innermost.
FUSED = ("gate_up_proj", "down_proj")
REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def is_parameter(name: str) -> bool:
    """Whether a key of `Run.updates` is a parameter, or a block of one, and not a module."""
    return split_slice(name)[1] is not None or name.endswith((".weight", ".bias"))


@dataclass(frozen=True)
class Place:
    """Where an update goes in memory: rows `start` to `start + rows` of `parameter`, its leading
    axes flattened; `transposed`: those rows hold the weight as `[in, out]`."""

    parameter: str
    start: int
    rows: int
    columns: int
    transposed: bool


@dataclass(frozen=True)
class _Piece:
    """One tensor on disk. `rows`: for each of its rows the row in memory, -1 where it has none;
    None where every block of the tensor is the transposed block in memory."""

    name: str
    rows: torch.Tensor | None


@dataclass(frozen=True)
class _Group:
    """Tensors on disk that one conversion turns into parameters: `(name, pattern)`."""

    key: str
    converter: Any
    members: list[tuple[str, str]]


class Layout:
    """Names of a model class in memory against names in the base's files.

    Plain names are answered without transformers; it is imported when one is not found.
    """

    def __init__(
        self, base: BaseModel, architecture: str | None, num_labels: int | None = None
    ) -> None:
        self._base = base
        self.names = Names(base, architecture, num_labels)

    def find(self, name: str) -> str | None:
        """The tensor on disk that is the tensor `name` in memory, None where there is none."""
        plain = self._base.find(name)
        return plain if plain is not None else self._renamed.get(name)

    def is_fused(self, module: str) -> bool:
        """Whether the weight of `module`, a name on disk, is a part of a parameter in memory."""
        disk = self._base.find(f"{module}.weight")
        return any(disk == name for group in self._groups.values() for name, _ in group.members)

    def members(self, name: str) -> list[str]:
        """The tensors on disk that parameter `name` is made from by a conversion."""
        group = self._groups.get(name)
        return [disk for disk, _ in group.members] if group is not None else []

    def on_disk(self, run: Run) -> Run:
        """The run with its updates keyed by, and cut to, the tensors on disk, and those in the
        place of the parameters that it holds whole.

        Modules that are neither on disk nor in memory stay as they are.
        """
        run = self._whole_on_disk(run)
        missing = [
            module
            for module in run.updates
            if self._base.weight(module) is None
            or (self._base.lends(module) and self.find(f"{module}.weight") is not None)
        ]
        placed: dict[str, list[tuple[Place, str]]] = {}
        for module in missing:
            place = self.place(module, run.shapes[module])
            if place is not None:
                placed.setdefault(place.parameter, []).append((place, module))
        if not placed:
            return run
        moved = {module for parts in placed.values() for _, module in parts}
        loaders: dict[str, Callable[[], Update]] = {}
        shapes = {module: shape for module, shape in run.shapes.items() if module not in moved}
        origin: dict[str, str] = {}
        for module in shapes:
            loaders[module], origin[module] = _loader(run, module), module
        taken: dict[str, list[Taken]] = {}
        for parameter, parts in placed.items():
            alone = self._alone(parameter, [place for place, _ in parts])
            found = {} if alone is not None else self._taken(parameter, parts)
            if alone is not None:
                name, module = alone.removesuffix(".weight"), parts[0][1]
                loaders[name], origin[name] = _loader(run, module), module
                shapes[name] = run.shapes[module]
            elif not found:
                self._base.refuse_packed(parts[0][1])
                raise BaseError(
                    "the base holds no tensor for this module, whose weight may be tied",
                    file=self._base.path,
                    tensor=parts[0][1],
                    expected=parameter,
                    remedy="deploy it as an adapter (`adapter`)",
                )
            for disk, rows in found.items():
                taken.setdefault(disk, []).extend(rows)  # it may become several parameters
        for disk, rows in taken.items():
            name = disk.removesuffix(".weight")
            shapes[name] = rows_and_columns(self._base.tensors[disk].shape)
            loaders[name], origin[name] = spread(run, shapes[name], rows), rows[0][0]
        return replace(
            run,
            updates=LazyUpdates(loaders, shapes),
            start_rank={n: run.start_rank[m] for n, m in origin.items() if m in run.start_rank},
            embeddings=frozenset(n for n, m in origin.items() if m in run.embeddings),
        )

    def _whole_on_disk(self, run: Run) -> Run:
        """`run` with tensors on disk in the place of the parameters made of them that it holds."""
        held = run.replaced
        made = {n: g for n in held if self.find(n) is None and (g := self._groups.get(n))}
        if not made:
            return run
        result = {name: tensor for name, tensor in held.items() if name not in made}
        for group in {group.key: group for group in made.values()}.values():
            own = {name: held[name] for name, other in made.items() if other is group}
            members = {name: self._base.tensors[name] for name, _ in group.members}
            found = rejoined(own, members, partial(self._converted, group), self.names.model)
            if found is None:
                raise self._unknown(next(iter(own)), f"{len(members)} tensors")
            result |= found
        return replace(run, replaced=result)

    def place(self, name: str, shape: tuple[int, int]) -> Place | None:
        """Where the update `name`, of `shape [out, in]`, goes in memory; None: nowhere known."""
        if self.names.model is None:
            return None
        stem, index = split_slice(name)
        parameter = next((n for n in (f"{stem}.weight", stem) if n in self.names.state), None)
        if parameter is None:
            return self._older(name)
        full = self.names.state[parameter]
        rows, columns = rows_and_columns(full)
        start = 0
        if index is not None:
            if len(full) != 3 or index >= full[0]:
                raise BaseError(
                    "the run adapts an expert that the base does not have",
                    file=self._base.path,
                    tensor=name,
                    found=f"{parameter} {list(full)}",
                )
            rows, start = full[1], index * full[1]
        if index is None and sorted((rows, columns)) != sorted(shape):
            rows, columns = convolution_matrix(full)
        if sorted((rows, columns)) != sorted(shape):
            raise BaseError(
                "the run's update does not fit the base weight",
                file=self._base.path,
                tensor=name,
                found=f"{parameter} {list(full)}",
                expected=list(shape),
                remedy="is this the base the run was trained on? pass the right one with `base`",
            )
        transposed = (rows, columns) != shape
        if rows == columns and index is not None:
            owner = self.names.model.get_submodule(parameter.rpartition(".")[0])
            transposed = bool(getattr(owner, "is_transposed", False))
        return Place(parameter, start, rows, columns, transposed)

    def tensor(self, parameter: str) -> LazyTensor | None:
        """A parameter as loading makes it of what is on disk; None where it makes it of nothing."""
        disk, group = self.find(parameter), self._groups.get(parameter)
        if disk is not None or group is None:
            return None if disk is None else self._base.tensors[disk]
        members = {name: self._base.tensors[name] for name, _ in group.members}
        for tensor in members.values():
            refuse_quantized(tensor)

        def parts() -> dict[str, torch.Tensor]:
            return self._converted(group, {name: t.load() for name, t in members.items()})

        first = next(iter(members.values()))
        return Rejoined(parameter, first.path, first.dtype, self.names.state[parameter], parts)

    def weight(self, name: str, shape: tuple[int, int]) -> torch.Tensor | None:
        """The float32 weight `[out, in]`, of that shape, of a module or a block, as `tensor`."""
        place = self.place(name, shape)
        tensor = None if place is None else self.tensor(place.parameter)
        if place is None or tensor is None:
            return None
        refuse_quantized(tensor)
        value = load_finite(tensor).reshape(-1, place.columns)
        rows = value[place.start : place.start + place.rows]
        return rows.T.contiguous() if place.transposed else rows.contiguous()

    def _older(self, name: str) -> Place | None:
        """The place of a module of the form on disk, such as `experts.3.gate_proj`."""
        if not any(self.names.conversions):
            return None
        tensor = f"{name}.weight"
        parameter, pattern = self.names.rename(tensor)
        full = self.names.state.get(parameter)
        if full is None:
            return None
        if pattern is None:
            return Place(parameter, 0, math.prod(full[:-1]), full[-1], False)
        rows = self._reverted(parameter).get(tensor)
        if rows is None:
            return None
        start = int(rows[0])
        if not torch.equal(rows, torch.arange(start, start + len(rows))):
            raise self._unknown(parameter, "rows that are not adjacent in memory")
        return Place(parameter, start, len(rows), full[-1], False)

    def _alone(self, parameter: str, places: list[Place]) -> str | None:
        """The tensor on disk that is the parameter, where one update is of the whole of it."""
        total = math.prod(self.names.state[parameter])
        whole = [place.rows * place.columns for place in places] == [total]
        return self._renamed.get(parameter) if whole else None

    def _taken(self, parameter: str, parts: list[tuple[Place, str]]) -> dict[str, list[Taken]]:
        """Tensor on disk → the updates of its rows."""
        parts = sorted(parts, key=lambda part: part[0].start)
        starts = torch.tensor([place.start for place, _ in parts])
        result: dict[str, list[Taken]] = {}
        for piece in self._pieces(parameter):
            taken: list[Taken] = []
            if piece.rows is None:
                for place, module in parts:
                    block = torch.arange(place.columns)
                    first = place.start // place.rows * place.columns
                    taken.append((module, block + first, block, not place.transposed))
            else:
                owners = torch.searchsorted(starts, piece.rows, right=True) - 1
                for number in sorted(set(owners.tolist())):
                    place, module = parts[number]
                    rows = piece.rows - place.start
                    mine = (owners == number) & (rows < place.rows) & (piece.rows >= 0)
                    if number >= 0 and bool(mine.any()):
                        index = mine.nonzero().flatten()
                        taken.append((module, index, rows[index], place.transposed))
            if taken:
                result[piece.name] = taken
        return result

    def _pieces(self, parameter: str) -> list[_Piece]:
        disk = self._renamed.get(parameter)
        if disk is not None:
            return [_Piece(disk, torch.arange(math.prod(self.names.state[parameter][:-1])))]
        if parameter not in self._groups:
            return []
        group = self._groups[parameter]
        if any(type(op).__name__ == "Transpose" for op in group.converter.operations):
            return [self._transposed(group)]
        return self._traced(group)[parameter]

    def _transposed(self, group: _Group) -> _Piece:
        """A fused tensor that is transposed on loading, where its shape is not the one already."""
        (name, _), full = group.members[0], self.names.state[group.key]
        shape = self._base.tensors[name].shape
        only = len(group.members) == 1 and len(group.converter.operations) == 1
        if not only or len(full) != 3 or sorted(shape) != sorted(full):
            raise self._unknown(group.key, f"{name} {list(shape)}")
        if shape == full and group.converter.operations[0].check_dims:
            return _Piece(name, torch.arange(math.prod(full[:-1])))
        return _Piece(name, None)

    def _traced(self, group: _Group) -> dict[str, list[_Piece]]:
        """Parameter → the tensors on disk that it is made from, by numbering their rows."""
        spans, tracers, total = [], {}, 0
        for name, _ in group.members:
            shape = self._base.tensors[name].shape
            rows = math.prod(shape[:-1])
            tracers[name] = torch.arange(total, total + rows).view(*shape[:-1], 1)
            spans.append((name, total, total + rows))
            total += rows
        result: dict[str, list[_Piece]] = {}
        for parameter, numbers in self._converted(group, tracers).items():
            full = self.names.state.get(parameter)
            if full is None or numbers.shape != (*full[:-1], 1):
                raise self._unknown(parameter, f"{list(numbers.shape)} for {full}")
            position = torch.full((total,), -1)
            position[numbers.flatten()] = torch.arange(numbers.numel())
            result[parameter] = [_Piece(name, position[a:b]) for name, a, b in spans]
        return result

    def _converted(
        self, group: _Group, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Parameter → what loading makes of the `tensors` on disk of `group`."""
        converter, model = deepcopy(group.converter), self.names.model
        for name, pattern in group.members:
            converter.add_tensor(group.key, name, pattern, tensors[name])
        try:
            made = converter.convert(group.key, model=model, config=model.config)
        except Exception as error:
            raise self._unknown(group.key, f"{type(error).__name__}: {error}") from None
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}

    def _reverted(self, parameter: str) -> dict[str, torch.Tensor]:
        """Name in the form on disk → the rows of `parameter` that it holds."""
        from transformers.core_model_loading import revert_weight_conversion

        full = self.names.state[parameter]
        tracer = torch.arange(math.prod(full[:-1])).view(*full[:-1], 1)
        state = revert_weight_conversion(self.names.model, {parameter: tracer})
        return {name: rows.flatten() for name, rows in state.items()}

    def _unknown(self, parameter: str, found: str) -> BaseError:
        return BaseError(
            "transformers converts this tensor on loading in a way that is not known here",
            file=self._base.path,
            tensor=parameter,
            found=found,
            remedy="load and save the base with transformers, and use the new folder as base",
        )

    @cached_property
    def _sources(self) -> tuple[dict[str, str], dict[str, _Group]]:
        renamed: dict[str, str] = {}
        groups: dict[str, _Group] = {}
        if self.names.model is None or not any(self.names.conversions):
            return renamed, groups
        from transformers.core_model_loading import dot_natural_key

        converters = {
            p: entry for entry in self.names.conversions[1] for p in entry.source_patterns
        }
        for name in sorted(self._base.tensors, key=dot_natural_key):
            parameter, pattern = self.names.rename(name)
            if parameter not in self.names.state:
                continue
            if pattern is None:
                renamed.setdefault(parameter, name)
                continue
            converter = converters[pattern]
            group = groups.setdefault(parameter, _Group(parameter, converter, []))
            group.members.append((name, pattern))
            first = converter.target_patterns[0]
            for target in converter.target_patterns[1:]:
                groups.setdefault(parameter.replace(first, target), group)
        return renamed, groups

    @property
    def _renamed(self) -> dict[str, str]:
        """Parameter → the tensor on disk that is the same under another name."""
        return self._sources[0]

    @property
    def _groups(self) -> dict[str, _Group]:
        return self._sources[1]


def _loader(run: Run, module: str) -> Callable[[], Update]:
    return lambda: run.take(module)
