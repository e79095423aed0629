"""What a reader hands on: a training run, read lazily and never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RunError
from .files.handles import State, state_at
from .files.tensors import LazyTensors
from .updates.memo import Memo
from .updates.update import Update

if TYPE_CHECKING:
    from .fit import FitReport


# A warning: PEFT and others make an adapter that does nothing, until it is trained and saved.
NO_UPDATE = (
    "the update is zero everywhere: training changed nothing, or what it changed is not in the "
    "run's files"
)


class LazyUpdates(Mapping[str, Update]):
    """Module name → update, read when it is asked for.

    `loaders` read one update each; `shapes` are those, `[out, in]`, that are known without reading.
    What was read last stays in memory within the bound of `Memo`, so that a command which comes
    back to an update reads it once. A merge, which uses each once, takes them and keeps none. Shape
    and rank are always kept, which is all that a plan or a report asks again.
    """

    def __init__(
        self,
        loaders: Mapping[str, Callable[[], Update]],
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self._loaders = loaders
        self.known_shapes = dict(shapes or {})
        self._ranks: dict[str, int | None] = {}
        self._memo = Memo()

    def __getitem__(self, module: str) -> Update:
        update = self.take(module)
        self._memo.remember(module, update)
        return update

    def take(self, module: str) -> Update:
        """The update, for one who will not come back to it: it is not kept."""
        update = self._memo.get(module)
        if update is None:
            update = self._loaders[module]()
            components = update.components()
            self._ranks[module] = None if components is None else components.rank
            self.known_shapes[module] = update.shape
        return update

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def __contains__(self, module: object) -> bool:
        return module in self._loaders  # without reading it, as a mapping does by itself

    def shape(self, module: str) -> tuple[int, int]:
        """`[out, in]` of an update, which is read only where its shape is not known."""
        return self.known_shapes[module] if module in self.known_shapes else self[module].shape

    def rank(self, module: str) -> int | None:
        """The rank of an update, which is read only for the first time; None where it has none."""
        if module not in self._ranks:
            self[module]
        return self._ranks[module]

    def renamed(self, names: Mapping[str, str]) -> LazyUpdates:
        """The same updates under other names; those that `names` lacks keep theirs."""
        new = type(self)(
            {names.get(m, m): partial(self.take, m) for m in self},
            {names.get(m, m): shape for m, shape in self.known_shapes.items()},
        )
        new._ranks = {names.get(m, m): rank for m, rank in self._ranks.items()}
        return new

    def kept(self) -> LazyUpdates:
        """The same updates, for several who will each take them: what is taken is kept here."""
        loaders = {module: partial(self.__getitem__, module) for module in self}
        return type(self)(loaders, self.known_shapes)

    @classmethod
    def of(cls, updates: Mapping[str, Update]) -> LazyUpdates:
        """`updates` themselves where they are lazy."""
        if isinstance(updates, cls):
            return updates
        return cls({module: partial(updates.__getitem__, module) for module in updates})


class _Stripped(LazyUpdates):
    """Updates without pruned components."""


def strip_update(update: Update, module: str, path: Path) -> Update:
    """The update without zero and dependent components, in order of size; other kinds as they
    are. Raises `RunError` when the product of what was trained leaves the range of float32."""
    components = update.components()
    if components is None:
        return update
    alive = components.strip()
    if not alive.is_finite():
        raise RunError("the update is not of finite numbers", file=path, tensor=module)
    return alive.reduced().sorted()


@dataclass(frozen=True)
class Run:
    """A finished (or interrupted) training run.

    `updates`: Hugging Face module name → update. `replaced`: tensor name → tensor trained whole.
    `embedded_base`: the frozen weights that a reference checkpoint carries, by tensor name.
    `base`: the base model the run names, a hub id, and `revision` which state of it. `start_rank`:
    rank per module before pruning.
    `embeddings`: the modules of `updates` that are embeddings, `[vocab, dim]`. `tied`: those whose
    update also reaches the tensors that share their weight. `apart`: the tensors of `replaced` that
    are copies of their own: what was tied to them keeps its values. `kernels`: module →
    `[in, *kernel]` of those that are convolutions, whose weights `[out, in, *kernel]` are seen as
    `[out, in·kernel]`. `fit`: how the updates were cut, None where they are as trained. `inputs`:
    the folders and files that were given, beside or above `path`. `states`: of `files` when reading
    began, None of one that was not there.

    A key of `updates` is a module, whose weight the update is for; or a parameter such as a bias
    `[n]`, which is seen as `[1, n]`; or `parameter[e]`, block e of a parameter `[E, …]`.
    """

    path: Path
    method: str
    updates: Mapping[str, Update]
    replaced: LazyTensors = field(default_factory=dict)
    embedded_base: LazyTensors | None = None
    base: str | None = None
    revision: str | None = None
    task: str | None = None
    num_labels: int | None = None
    finished: bool = True
    start_rank: Mapping[str, int] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    fit: FitReport | None = None
    inputs: tuple[Path, ...] = ()
    states: Mapping[Path, State | None] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether a file of the run is another one by now, or was already while it was read."""
        return any(state_at(path) != known for path, known in self.states.items())

    @cached_property
    def _updates(self) -> LazyUpdates:
        return LazyUpdates.of(self.updates)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """`[out, in]` of every update. No data is read where the reader knows them."""
        return {module: self._updates.shape(module) for module in self.updates}

    @cached_property
    def ranks(self) -> Mapping[str, int | None]:
        """The rank of every update as it stands, None where it has none: of a run as it was read,
        that of what is stored; of a stripped one, what training left of it.

        Reads what has not been read yet. A merge therefore asks when it has written.
        """
        return {module: self._updates.rank(module) for module in self.updates}

    def renamed(self, modules: Mapping[str, str], tensors: Mapping[str, str]) -> Run:
        """The run with other names of modules, and of the tensors trained whole or frozen; those
        that have none keep their own. Raises `RunError` where two become one."""
        for names, old in ((modules, self.updates), (tensors, self.replaced)):
            new = [names.get(name, name) for name in old]
            if len(set(new)) < len(new):
                twice = next(name for name in new if new.count(name) > 1)
                raise RunError("two names in the run are one module", file=self.path, tensor=twice)
        frozen = self.embedded_base
        return replace(
            self,
            updates=self._updates.renamed(modules),
            replaced={tensors.get(name, name): t for name, t in self.replaced.items()},
            embedded_base=frozen and {tensors.get(name, name): t for name, t in frozen.items()},
            start_rank={modules.get(m, m): rank for m, rank in self.start_rank.items()},
            embeddings=frozenset(modules.get(m, m) for m in self.embeddings),
            tied=frozenset(modules.get(m, m) for m in self.tied),
            apart=frozenset(tensors.get(name, name) for name in self.apart),
            kernels={modules.get(m, m): kernel for m, kernel in self.kernels.items()},
            fit=None if self.fit is None else self.fit.renamed(modules),
        )

    def rank(self, module: str) -> int | None:
        """The rank of one update as it stands; None where it has none."""
        return self._updates.rank(module)

    def take(self, module: str) -> Update:
        """One update, for one who will not come back to it: it is not kept in memory."""
        return self._updates.take(module)

    def kept(self) -> Run:
        """The run for a writer whose work is proved against this one afterwards: within the bound
        of `Memo` the proof finds what the writer took."""
        return replace(self, updates=self._updates.kept())

    def strip(self) -> Run:
        """The run without pruned components, the same one at every call."""
        return self if isinstance(self.updates, _Stripped) else self._stripped

    @cached_property
    def _stripped(self) -> Run:
        # Nothing here holds the run, so that both go when nobody needs them.
        updates, path = self._updates, self.path

        def load(module: str) -> Update:
            return strip_update(updates.take(module), module, path)

        loaders = {module: partial(load, module) for module in updates}
        return replace(self, updates=_Stripped(loaders, updates.known_shapes))
