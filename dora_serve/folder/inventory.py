"""What a folder holds that can be served: base models, runs and adapters, and ONNX folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from converters.errors import (
    DoraExportError,
    MissingError,
    RunError,
    TensorFileError,
    apart,
    visible,
)
from converters.files.handles import OF_THE_DISK, State, reading, real, state_at
from converters.files.onnx_files import ENCODER, MODEL, is_onnx_folder
from converters.model.base import BaseModel, open_base
from converters.readers import Reader, ReadOptions, is_run, read_run, readers
from converters.readers.run_folder import CONFIG_FILE, WEIGHT_FILES
from converters.run import Run

from .names import name_elsewhere, names_below, not_a_name, own_name
from .pairing import base_of, check_fits, is_named, naming, told
from .unused import unused

_MARKS = (CONFIG_FILE, *WEIGHT_FILES, "config.json", MODEL, ENCODER)
_ODD = "odd: "
_BELOW_A_LINK = 100  # folders that are looked into
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


@dataclass(frozen=True)
class Member:
    """A run (or adapter, which is a run too), the folder it is in, and the base it belongs to."""

    name: str
    path: Path
    run: Run
    base: BaseModel
    state: Mapping[Path, State | None]  # of the run's files when reading began, None: not there

    def changed(self) -> bool:
        """Whether a file of the run is another one by now, or was already while it was read."""
        return any(state_at(path) != known for path, known in self.state.items())


@dataclass(frozen=True)
class Found:
    """What lies in a folder, each by its name (see `names`). `problems`: why the rest cannot be
    served. `bases` has those too that lie elsewhere: of members, and the one `given`, by its name.
    """

    bases: Mapping[str, BaseModel] = field(default_factory=dict)
    members: Mapping[str, Member] = field(default_factory=dict)
    onnx: Mapping[str, Path] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    given: str | None = None

    @property
    def warnings(self) -> dict[str, str]:
        """What to know of members that can be served, a line each, whatever a run is called in."""
        return {
            name: visible("; ".join(member.run.warnings))
            for name, member in self.members.items()
            if member.run.warnings
        }

    def files(self) -> Iterator[Path]:
        """The files and folders of everything that can be served."""
        for member in self.members.values():
            yield from (*member.run.files, member.path)
        yield from (*(base.path for base in self.bases.values()), *self.onnx.values())

    def of(self, base: BaseModel) -> list[Member]:
        """The members that belong to `base`."""
        return [member for member in self.members.values() if member.base.path == base.path]

    def name_of(self, base: BaseModel) -> str:
        """What `base` is called, which is one of `bases`."""
        return next(name for name, known in self.bases.items() if known.path == base.path)


def discover(root: Path, base: str | Path | None = None) -> Found:
    """Look through `root`. `base`: the base of every member; None finds each one's own, among the
    bases in `root` and, by the hub id a run names, in the local cache. Where nothing of `root` can
    be served, that base is not served in its place.

    Raises `MissingError` when there is no such folder, and what `open_base` raises for `base`.
    """
    if not root.is_dir():
        raise MissingError("no such folder", file=root, remedy="give the folder to serve")
    paths = dict(things_below(root, readers()))
    names = names_below(root, list(paths))
    problems = {names[path]: why for path in paths if (why := not_a_name(names[path]))}
    problems |= {names[path]: why for path, kind in paths.items() if (why := what_is_odd(kind))}
    paths = {path: kind for path, kind in paths.items() if names[path] not in problems}
    bases: dict[str, BaseModel] = {}
    for path in (path for path, kind in paths.items() if kind == "model"):
        with apart(problems, names[path]):
            bases[names[path]] = open_base(path)
    taken = {*names.values(), *map(own_name, names)}

    def known(one: BaseModel) -> BaseModel:
        """The same base as it is in `bases`, where it is put if need be."""
        place = one.path.resolve()
        own = next((each for each in bases.values() if each.path.resolve() == place), None)
        return own or bases.setdefault(name_elsewhere(place, {*taken, *bases}), one)

    here = list(bases.values())
    given = None if base is None else known(open_base(base))
    members = {}
    for path in (path for path, kind in paths.items() if kind == "run"):
        with apart(problems, names[path]):
            member = read_member(names[path], path, here, given)
            members[member.name] = replace(member, base=known(member.base))
    onnx = {names[path]: path for path, kind in paths.items() if kind == "onnx"}
    if problems and not (members or onnx or here):
        return Found(problems=problems)
    found = Found(bases, members, onnx, problems)
    return found if given is None else replace(found, given=found.name_of(given))


def read_member(
    name: str, path: Path, bases: Sequence[BaseModel], given: BaseModel | None = None
) -> Member:
    """Read the run at `path`, which belongs to `given` or else to one of `bases`. A run that names
    another base than the one given, or has a chat template of its own, has a warning.

    Raises `DoraExportError` when it cannot be read or its base is not known.
    """
    with reading(path, RunError):
        before = {file: state_at(file) for file in path.rglob("*")}
    try:
        run = read_run(path, ReadOptions(base=None if given is None else given.path))
    except DoraExportError as error:
        if given is not None or isinstance(error, TensorFileError):
            raise
        beside = _read_beside(path, bases)
        if beside is None:
            raise
        run = beside
    base = given or base_of(run, bases)
    with naming(run, base):
        check_fits(run, base)
    if given is not None:
        run = told(run, given)
    run = replace(run, warnings=(*run.warnings, *unused(run, base)))
    # Files above the folder are only known now.
    state = {
        file: before.get(file) if file.is_relative_to(path) else state_at(file)
        for file in run.files
    }
    return Member(name, path, run, base, state)


def _read_beside(path: Path, bases: Sequence[BaseModel]) -> Run | None:
    """A run of a method that can only be read beside its base: the one it names, or the only one
    that is here. None where it cannot be read so."""
    for base in bases:
        with suppress(DoraExportError):
            run = read_run(path, ReadOptions(base=base.path))
            if len(bases) == 1 or (run.base is not None and is_named(run.base, base)):
                return run
    return None


def things_below(root: Path, known: Sequence[Reader]) -> Iterator[tuple[Path, str]]:
    """Folders that hold something, with what: "run", "model", "onnx", or what is odd about it.
    Links are not followed, which is odd where one leads out of `root` to such a folder; and nothing
    is looked for inside what was found."""
    top = root.resolve()
    unread: list[OSError] = []
    for folder, below, files in os.walk(root, onerror=unread.append):
        path = Path(folder)
        kind = _kind(path, files, known) or _odd(path, [*files, *below])
        if kind is not None:
            yield path, kind
            if path != root or not kind.startswith(_ODD):  # what is odd of all says nothing of each
                below.clear()
        seen = sorted(name for name in below if not name.startswith("."))
        below[:] = [name for name in seen if real(path / name).is_relative_to(top)]
        for link in (path / name for name in seen if name not in below):
            if _holds_something(link, known):
                yield link, f"{_ODD}{_leads_out(link)}"
    for path in (Path(error.filename) for error in unread if not _is_gone(error)):
        if path.name != OF_THE_DISK:
            yield path, "run"  # it may hold one, and reading it says what is wrong with it


def _holds_something(link: Path, known: Sequence[Reader]) -> bool:
    """Whether what is looked for lies where a link leads, or in a folder there."""
    with suppress(OSError):
        inside = islice((each for each in link.iterdir() if each.is_dir()), _BELOW_A_LINK)
        return any(_kind(each, os.listdir(each), known) for each in (link, *inside))
    return True


def _leads_out(link: Path) -> RunError:
    return RunError(
        "a link out of the folder, which is not followed",
        file=link,
        found=real(link),
        remedy="put the folder itself here, or mount it here",
    )


def _is_gone(error: OSError) -> bool:
    """Whether the folder is no longer there since it was listed."""
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def what_is_odd(kind: str) -> str | None:
    """Of what `things_below` tells of a folder: what is odd about it, if anything."""
    return kind.removeprefix(_ODD) if kind.startswith(_ODD) else None


def _odd(path: Path, names: Sequence[str]) -> str | None:
    """What keeps a folder from being what its files' names say."""
    file = next((n for n in names if n in _MARKS and not (path / n).is_file()), None)
    return None if file is None else f"{_ODD}cannot be read: {file} is no file"


def _kind(path: Path, files: Sequence[str], known: Sequence[Reader]) -> str | None:
    try:
        if is_onnx_folder(path):
            return "onnx"
        if is_run(path, known):
            return "run"
        if "config.json" in files and any(next(path.glob(p), None) for p in _WEIGHTS):
            return "model"
    except (DoraExportError, PermissionError):
        return "run"  # reading it again says what is wrong with it
    except OSError:  # gone since its folder was listed
        return None
    return None
