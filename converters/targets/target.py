"""What every deployment target is. One registers under `dora_serve.targets`, ours as a stranger's.

A target is a light object: what reads tensors is imported by what it calls, so that its name and
its options cost a command line nothing.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ..errors import MissingError, TargetError
from ..progress import Progress
from .engines import PEFT, TRANSFORMERS, Profile

if TYPE_CHECKING:
    from ..model.base import BaseModel
    from ..run import Run
    from .model import Model


@dataclass(frozen=True)
class Report:
    """What only writing tells. `modules` and `details` go into the certificate."""

    modules: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """What a script is told beside the plan's."""
        return {}

    def lines(self) -> list[str]:
        """What people are told."""
        return []


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What will be written, decided from names, shapes and ranks before a byte is.

    `run`: without pruned components, and fitted where that was asked for. `base`: None where it is
    not known. `nbytes`: the room it needs, as far as is known. `pieces`: of its large files parts
    are hashed, where the whole would take half as long again as writing them.
    """

    pieces: ClassVar[bool] = False

    target: str
    run: Run
    base: BaseModel | None
    nbytes: int
    warnings: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[Path]:
        """The folders it reads, which the output must not touch."""
        return [self.run.path, *self.run.inputs, *([] if self.base is None else [self.base.path])]

    def summary(self) -> dict[str, Any]:
        """What a script is told, JSON."""
        return {}

    def lines(self) -> list[str]:
        """What people are told: of the whole in the first line, then of its parts."""
        return [f"{self.target} of {self.run.method}"]

    @abstractmethod
    def write(self, folder: Path, name: str, progress: Progress) -> Report:
        """Fill the empty `folder`, which will be called `name`, with all but the certificate."""

    def certificate(self, report: Report) -> dict[str, object]:
        """What the certificate says, but for the files and their hashes."""
        from ..certificate import certificate

        return certificate(self.target, self.run, self.base, report.modules, **report.details)


class Target(Protocol):
    """A format that a run is deployed in. Who inherits this has what is the same for most.

    `options`: a frozen dataclass whose fields are made by `option`, all with defaults. `kind`: a
    whole "model", for which the base must be known, or an "adapter" beside it. `engines`: those
    that `open` can load it in, the default first. `profile`: how its engine reads a LoRA folder,
    where it is one, for `lint`.
    """

    name: str
    kind: Literal["model", "adapter"]
    options: type[Any]
    engines: tuple[str, ...] = ()
    profile: Profile | None = None

    @abstractmethod
    def plan(self, run: Run, base: BaseModel | None, options: Any) -> Plan:
        """Plan to write `run`, which holds no pruned components. Raises `DoraExportError` for what
        the target cannot carry, naming the tensors and the remedy."""

    def holds(self, folder: Path) -> bool:  # noqa: ARG002
        """Whether `folder`, which has no certificate, looks like this target's."""
        return False

    def open(self, folder: Path, base: BaseModel, run: Run, engine: str) -> Model:
        """What is in `folder`, ready to compute in `engine`. `run` says which class and how many
        labels, and which of several adapters."""
        from .model import open_in

        return open_in(engine, folder, base, run)


def targets() -> dict[str, Target]:
    """Every installed target by its name, in that order."""
    return {target.name: target for target in _installed(*sys.path)}


@cache
def _installed(*_: str) -> tuple[Target, ...]:
    """Once for each `sys.path`: looking through all that is installed takes its time."""
    points = sorted(entry_points(group="dora_serve.targets"), key=lambda point: point.name)
    return tuple(point.load()() for point in points)


def target_named(name: str) -> Target:
    """The installed target of that name; raises `TargetError` where there is none."""
    known = targets()
    if name not in known:
        raise TargetError("unknown target", found=name, expected=", ".join(known))
    return known[name]


def target_of(folder: Path) -> Target:
    """The target that wrote `folder`, by its certificate, else by how the folder looks to each."""
    from ..certificate import FILE
    from ..files.handles import check_there
    from ..files.json_files import read_json

    check_there(folder)
    file = folder / FILE
    wrote = read_json(file).get("target") if file.is_file() else None
    if wrote is not None:
        return target_named(str(wrote))
    for target in targets().values():
        if target.holds(folder):
            return target
    raise MissingError(
        "no artifact here", file=folder, expected=f"what one of these wrote: {', '.join(targets())}"
    )


def profiles() -> dict[str, Profile]:
    """How each engine reads a LoRA folder: those of the targets, and transformers, which has PEFT's
    layers and a loader of its own."""
    known = {n: t.profile for n, t in targets().items() if t.profile is not None}
    return {"peft": PEFT, "transformers": TRANSFORMERS, **known}
