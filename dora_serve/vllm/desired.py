"""What a vLLM of one base should have of a folder, look after look: the one answer for `watch`, the
resolver and `up --live`.

A change is acted upon when two looks in a row see the same files, so that a run that is being
written or exchanged is not taken for damaged, nor for what it never was. What is served lies in the
cache alone (`vllm_adapter`): nothing that happens in the folder reaches a server but through here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from converters.errors import DoraExportError, MissingError, RunError, visible
from converters.files.handles import real
from converters.model.base import BaseModel, open_base
from converters.readers import readers

from ..folder.inventory import Member, read_member, things_below, what_is_odd
from ..folder.names import names_below, own_name
from .convert import vllm_adapter
from .kept_names import KeptNames
from .server_base import ServerBase
from .states import State, blind, state_below

SETTLE = 0.25  # seconds between two looks at what just came or changed
PATIENCE = 60.0  # that whoever asks waits for a run that somebody is writing
_AT_ONCE = 1.0  # seconds of converting in one look, or as many as finding what changed took
_WRITTEN = "the run is being written"


@dataclass(frozen=True)
class Wanted:
    """Of one run: the folder to load, or why there is none. Both where a run that can no longer be
    served goes on as it was."""

    adapter: Path | None
    problem: str = ""
    warnings: tuple[str, ...] = ()


UNREAD = Wanted(None, _WRITTEN)


@dataclass(frozen=True)
class Desired:
    """Name → adapter folder of everything in a folder; what cannot be served, with the reason; what
    to know of the rest; and the names of runs that came and are not yet at rest."""

    adapters: Mapping[str, Path]
    problems: Mapping[str, str] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    moving: Collection[str] = ()


@dataclass
class _Known:
    """A run as it was read: the state of its files, inside its folder and elsewhere."""

    state: State
    elsewhere: Mapping[Path, State]
    base: Path | None
    wanted: Wanted


class Following:
    """The runs and adapters below `root`.

    `given`: the base of every run, whatever it names. `server`: the base of the server, beside
    which all runs are read; None: each has its own among the bases in `root`. `reserved`: names
    that a run cannot have, since the server calls its base so. `check` raises where the server has
    no room for a run. `keep`: what can no longer be served goes on as it was.
    """

    def __init__(
        self,
        root: Path,
        *,
        given: BaseModel | None = None,
        server: BaseModel | None = None,
        reserved: Collection[str] = (),
        check: Callable[[Member], object] = lambda _member: None,
        keep: bool = False,
    ) -> None:
        self._place, self.root = root.absolute(), root.resolve()
        self._given, self._server = given, None if server is None else ServerBase(server)
        self._reserved, self._check, self._keep = set(reserved), check, keep
        self._names = KeptNames(self._place)
        self._paths: dict[str, Path] = {}  # of the names that were asked for
        self._odd: Mapping[str, str] = {}  # what cannot be read as anything, with the reason
        self._seen: dict[Path, tuple[State, float]] = {}  # and since when
        self._known: dict[Path, _Known] = {}
        self._bases: dict[Path, tuple[State, BaseModel]] = {}
        self._finding = Lock()  # many ask at once
        self._base: Path | None = None  # the one of all runs, once `look` has found one alone

    def find(self, name: str) -> bool:
        """Whether there is a run of this name, or one whose path below the folder it is.

        Raises `MissingError` when the folder is gone, as `look` does.
        """
        with self._finding:
            known = self._walk()
            if name not in known:
                below = {path.relative_to(self.root).as_posix(): path for path in known.values()}
                if name not in below:
                    return False
                self._paths[name] = below[name]
            return True

    def odd(self, name: str) -> str | None:
        """Why what `find` found no run in is none, where it looks like one; its places unsaid."""
        why = self._odd.get(name)
        return None if why is None else why.partition("\n")[0]

    def all(self) -> list[str]:
        """The names of all runs there are, and of those that went and are not yet let go."""
        return list(self._walk())

    def changed(self, names: Iterable[str]) -> list[str]:
        """The names of runs that came, changed or went, and are now at rest; none where the whole
        folder is away, as a disk may be."""
        if not self._place.is_dir():
            return []
        with self._finding:
            self._arrive()
        found = []
        for name in names:
            path = self._paths.get(name)
            if path is None:
                continue
            state, (before, since) = self._now(path), self._seen.get(path, (None, 0.0))
            now = time.monotonic()
            if state != before:
                self._seen[path] = state, now
            elif now - since >= 0.9 * SETTLE + blind(state) and not self._is_known(path, state):
                found.append(name)
        return found

    def renew(self, name: str) -> Wanted | None:
        """Read and convert the run: what is wanted of it from now on, None when it is gone."""
        path = self._paths.get(name)
        if path is None:
            return None
        state, _ = self._seen.get(path, ({}, 0.0))
        if not state:
            self._known.pop(path, None)
            return None
        elsewhere: dict[Path, State] = {}
        base = None
        try:
            member = self._read(name, path)
            base = member.base.path
            elsewhere = {
                file: state_below(file) for file in member.state if not file.is_relative_to(path)
            }
            wanted = Wanted(vllm_adapter(member), warnings=member.run.warnings)
        except Exception as error:  # of one run, which nobody else's is to suffer from
            wanted = Wanted(None, _told(error))
            if self._server is not None:  # it is tried again where the base changes
                elsewhere = self._server.elsewhere()
        old = self._known.get(path)
        if self._now(path) != state:  # changed meanwhile: another look will tell
            return UNREAD if old is None else old.wanted
        if wanted.adapter is None and self._keep and old is not None:
            wanted = Wanted(old.wanted.adapter, wanted.problem, old.wanted.warnings)
        self._known[path] = _Known(state, elsewhere, base, wanted)
        return wanted

    def settled(self, name: str) -> Wanted | None:
        """What is wanted of the run as its files were last seen, None when it is gone; `UNREAD`
        while they change, or were not yet read."""
        path = self._paths.get(name)
        if path is None:  # gone before it was read
            return None
        state, known = self._seen.get(path, ({}, 0.0))[0], self._known.get(path)
        if known is None:
            return UNREAD if state else None
        return known.wanted if self._is_known(path, state) else UNREAD

    def current(self, name: str) -> Wanted | None:
        """What is wanted of the run as far as it was found out: `UNREAD` where it was not yet, None
        when the run is gone."""
        path = self._paths.get(name)
        if path is not None and path in self._known:
            return self._known[path].wanted
        gone = path is None or not self._seen.get(path, ({"": ()}, 0.0))[0]
        return None if gone else UNREAD

    def look(self) -> Desired:
        """What is wanted of the whole folder by now. Converts for about a second, or as long as it
        took to look through a large folder, so that what is ready waits for nobody; the rest is
        `moving`, and another look's.

        Raises `RunError` when the runs are of several bases from the start; later it is a problem
        of those that are of another one.
        """
        began = time.monotonic()
        changed = self.changed(self.all())
        end = max((now := time.monotonic()) + _AT_ONCE, 2 * now - began)
        for name in changed:
            self.renew(name)
            if time.monotonic() > end:
                break
        known = {n: self._known[p] for n, p in self._paths.items() if p in self._known}
        bases = {k.base: own_name(k.base) for k in known.values() if k.base is not None}
        if self._base is None and len(bases) > 1:
            raise RunError(
                "one server has one base",
                file=self.root,
                found=", ".join(sorted(bases.values())),
                remedy="choose with `base`",
            )
        if self._base is None and bases:
            (self._base,) = bases
        wanted = {
            name: each.wanted
            if each.base in (None, self._base)
            else Wanted(None, f"the run is of another base than the rest: {own_name(each.base)}")
            for name, each in known.items()
        }
        return Desired(
            {name: w.adapter for name, w in wanted.items() if w.adapter is not None},
            {**self._odd, **{name: w.problem for name, w in wanted.items() if w.problem}},
            {name: visible("; ".join(w.warnings)) for name, w in wanted.items() if w.warnings},
            {
                name
                for name, path in self._paths.items()
                if name not in known and self._seen[path][0]
            },
        )

    def at_rest(self) -> Desired:
        """What is wanted of the whole folder once nothing moves there, or after a minute in which
        no more of it was read than before."""
        found = self.look()
        fewest, end = len(found.moving), time.monotonic() + PATIENCE
        while self.moving and time.monotonic() < end:
            time.sleep(SETTLE)
            found = self.look()
            if len(found.moving) < fewest:
                fewest, end = len(found.moving), time.monotonic() + PATIENCE
        return found

    @property
    def moving(self) -> bool:
        """Whether something came or changed that is not yet acted upon."""
        return any(not self._is_known(path, state) for path, (state, _) in self._seen.items())

    def _walk(self) -> dict[str, Path]:
        """Name → folder of all runs. What went is remembered until it was seen to be gone twice."""
        if not self._place.is_dir():
            raise MissingError(
                "no such folder", file=self._place, remedy="give the folder to serve"
            )
        self._arrive()
        kinds = dict(things_below(self.root, readers()))
        runs = [path for path, kind in kinds.items() if kind == "run"]
        if self._server is None:
            self._open([path for path, kind in kinds.items() if kind == "model"])
        # Another thread may add to it, also what lay where the link led before.
        known = [path for path in list(self._known) if path.is_relative_to(self.root)]
        runs = [*runs, *(path for path in known if path not in kinds)]
        own = names_below(self.root, list({**kinds, **dict.fromkeys(runs)}))
        there = {*runs, *known}
        asked = {name: path for name, path in self._paths.items() if path in there}
        self._paths = {**asked, **self._names.of(self.root, runs, own, self._reserved)}
        odd = {own[path]: what_is_odd(kind) for path, kind in kinds.items()}
        self._odd = {n: why for n, why in odd.items() if why and n not in self._paths}
        self._seen = {path: e for path, e in list(self._seen.items()) if path in there}
        return self._paths

    def _arrive(self) -> None:
        """Follow the folder where the link leads by now: the run at a place below it is what became
        of the one that was at that place before."""
        before, root = self.root, real(self._place)
        if root == before or not root.is_dir():
            return
        self.root = root

        def now(path: Path) -> Path:
            return root / path.relative_to(before) if path.is_relative_to(before) else path

        self._paths = {name: now(path) for name, path in self._paths.items()}
        self._seen = {now(path): seen for path, seen in list(self._seen.items())}
        known = list(self._known.items())
        self._known = {now(p): replace(k, base=k.base and now(k.base)) for p, k in known}
        self._base = None if self._base is None else now(self._base)

    def _open(self, paths: Iterable[Path]) -> None:
        """Open the bases at `paths`, anew where they changed."""
        before, self._bases = self._bases, {}
        for path in paths:
            state = state_below(path)
            if path in before and before[path][0] == state:
                self._bases[path] = before[path]
            else:
                with suppress(DoraExportError):
                    self._bases[path] = state, open_base(path)

    def _now(self, path: Path) -> State:
        """The state of a run; of one that became a link, that it is gone, as whoever looks for the
        first time finds it."""
        return state_below(path) if real(path) == path else {}

    def _is_known(self, path: Path, state: State) -> bool:
        known = self._known.get(path)
        if known is None:
            return not state
        adapter = known.wanted.adapter
        return (
            known.state == state
            and (adapter is None or adapter.is_dir())  # not where the cache was emptied
            and all(state_below(place) == then for place, then in known.elsewhere.items())
        )

    def _read(self, name: str, path: Path) -> Member:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise RunError("its name is no text, which no request can give", file=path) from None
        here = [base for _, base in self._bases.values()]
        bases = here if self._server is None else [self._server.base]
        member = read_member(name, path, bases, self._given)
        if self._server is not None:
            self._server.check(member)
        self._check(member)
        return member


def _told(error: Exception) -> str:
    """The error as whoever asks may read it: in one line, without where the files lie."""
    lines = [line.strip() for line in str(error).splitlines()] or [repr(error)]
    if not isinstance(error, DoraExportError):
        return f"{type(error).__name__}: {lines[0]}"
    return "; ".join(
        f"file: {Path(line).name}" if line.startswith("file: ") else line for line in lines
    )
