"""What a folder holds that can be served: base models, runs and adapters, and ONNX folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import BaseError, DoraExportError, MissingError, RunError
from converters.files.handles import State, reading, state_at
from converters.files.onnx_files import is_onnx_folder
from converters.model.base import BaseModel, fingerprint, open_base
from converters.readers import Reader, ReadOptions, is_run, read_run, readers
from converters.run import Run

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
    """What lies in a folder, each by its name. `problems`: why the rest cannot be served.

    A name is the folder's own where it is the only one so called, else its path below the root.
    """

    bases: Mapping[str, BaseModel] = field(default_factory=dict)
    members: Mapping[str, Member] = field(default_factory=dict)
    onnx: Mapping[str, Path] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)

    def of(self, base: BaseModel) -> list[Member]:
        """The members that belong to `base`."""
        return [member for member in self.members.values() if member.base.path == base.path]


def discover(root: Path, base: str | Path | None = None) -> Found:
    """Look through `root`. `base`: the base of every member; None finds each one's own, among the
    bases in `root` and, by the hub id a run names, in the local cache.

    Raises `MissingError` when there is no such folder, and what `open_base` raises for `base`.
    """
    if not root.is_dir():
        raise MissingError("no such folder", file=root, remedy="give the folder to serve")
    paths = list(_walk(root, readers()))
    names = _names(root, [path for path, _ in paths])
    problems: dict[str, str] = {}
    bases = {}
    for path, kind in paths:
        if kind == "model":
            try:
                bases[names[path]] = open_base(path)
            except DoraExportError as error:
                problems[names[path]] = str(error)
    given = None if base is None else open_base(base)
    members = {}
    for path, kind in paths:
        if kind == "run":
            try:
                members[names[path]] = read_member(names[path], path, list(bases.values()), given)
            except DoraExportError as error:
                problems[names[path]] = str(error)
    onnx = {names[path]: path for path, kind in paths if kind == "onnx"}
    return Found(bases, members, onnx, problems)


def read_member(
    name: str, path: Path, bases: Sequence[BaseModel], given: BaseModel | None = None
) -> Member:
    """Read the run at `path`, which belongs to `given` or else to one of `bases`.

    Raises `DoraExportError` when it cannot be read or its base is not known.
    """
    with reading(path, RunError):
        before = {file: state_at(file) for file in path.rglob("*")}
    try:
        run = read_run(path, ReadOptions(base=None if given is None else given.path))
    except DoraExportError:
        if given is not None or len(bases) != 1:
            raise
        # Some methods can only be read beside their base.
        given = bases[0]
        run = read_run(path, ReadOptions(base=given.path))
    base = given or base_of(run, bases)
    if given is not None or run.embedded_base is None:
        check_fits(run, base)
    # Files above the folder are only known now.
    state = {
        file: before.get(file) if file.is_relative_to(path) else state_at(file)
        for file in run.files
    }
    return Member(name, path, run, base, state)


def find_run(root: Path, name: str) -> Path | None:
    """The folder of the run below `root` that is called `name`: by its path, or by its own name
    where no other has it. None when there is none; nothing outside of `root` is found."""
    top = root.resolve()
    known = readers()
    try:
        path = (top / name).resolve()
        if path != top and path.is_relative_to(top) and path.is_dir():
            below = [p.name for p in path.iterdir()]
            return path if _kind(path, below, known) == "run" else None
    except (OSError, ValueError):  # no name of a file, or gone
        return None
    folders = [path for path, kind in _walk(top, known) if kind == "run"]
    names = {own: path for path, own in _names(top, folders).items()}
    return names.get(name)


def base_of(run: Run, bases: Sequence[BaseModel]) -> BaseModel:
    """The one of `bases` that `run` was trained on: the one whose weights its checkpoint carries,
    the one it names, or the only one whose matrices have the shapes of its updates.

    Raises `BaseError` when that is none or several.
    """
    fitting = [base for base in bases if fits(run, base)]
    if run.base is not None:
        wanted = Path(run.base).name
        named = [base for base in fitting if wanted in (base.path.name, Path(base.name).name)]
        if len(named) == 1:
            return named[0]
        if not Path(run.base).exists() and not Path(run.base).is_absolute() and not fitting:
            return open_base(run.base)
    if len(fitting) == 1:
        return fitting[0]
    raise BaseError(
        "the run's base is not known",
        file=run.path,
        found=f"{len(fitting)} bases that fit: {', '.join(base.name for base in fitting)}"
        if fitting
        else f"no base that fits among {len(bases)}"
        + ("" if run.base is None else f"; the run names {run.base}"),
        remedy="put the base into the folder, or pass --base",
    )


def fits(run: Run, base: BaseModel) -> bool:
    """Whether `base` has every matrix that `run` updates, in its shape, and the frozen weights that
    a checkpoint carries."""
    if run.embedded_base is not None:
        for module in run.updates:
            own, weight = run.embedded_base.get(f"{module}.weight"), base.weight(module)
            if own is None or weight is None or fingerprint(own) != fingerprint(weight):
                return False
        return True
    try:
        check_fits(run, base)
    except BaseError:
        return False
    return True


def check_fits(run: Run, base: BaseModel) -> None:
    """Raise `BaseError` when a matrix that `run` updates is not in `base`, or of another shape."""
    for module, shape in run.shapes.items():
        base.is_transposed(module, shape, module in run.embeddings)


def _walk(root: Path, known: Sequence[Reader]) -> Iterator[tuple[Path, str]]:
    """Folders that hold something, with what: "run", "model" or "onnx". Links are not followed
    out of `root`, and nothing is looked for inside what was found."""
    top = root.resolve()
    for folder, below, files in os.walk(root):
        path = Path(folder)
        kind = _kind(path, files, known)
        if kind is not None:
            below.clear()
            yield path, kind
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".") and (path / name).resolve().is_relative_to(top)
        )


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


def _names(root: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """The name of every folder; `root` itself goes by its own name."""
    own = [path.resolve().name for path in paths]
    return {
        path: name if own.count(name) == 1 else path.relative_to(root).as_posix()
        for path, name in zip(paths, own, strict=True)
    }
