"""What a batch will do: its runs, each with its place, checked before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from converters.certificate import FILE as CERTIFICATE
from converters.errors import MissingError, OutputError
from converters.files.handles import check_there, reading, there
from converters.files.output import check_output, check_place

from .job import Job, Record
from .manifest import (
    EXPECTED,
    NO_NAME,
    Entry,
    ManifestError,
    Place,
    absolute,
    check_names,
    is_possible,
    meet,
    meeting,
    place_of,
    read_manifest,
)
from .status import FILE, Status, printable

if TYPE_CHECKING:
    from dora_serve.folder.inventory import Member


@dataclass(frozen=True)
class Batch:
    """What is to be done. `problems`: what of the folder cannot be read as a run or its base."""

    out: Path
    jobs: Sequence[Job]
    problems: Mapping[str, str] = field(default_factory=dict)


def plan_batch(
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    to: str = "adapter",
    target: str = "peft",
    force: bool = False,
) -> Batch:
    """What to do for the manifest or folder `source`; writes nothing.

    `base` and `to` hold where an entry says nothing. `force`: convert what is done, replace folders
    that no batch made, and write beside what no batch wrote. Raises `DoraExportError` when the
    batch as a whole cannot be done.
    """
    check_there(source)
    out = out.absolute()
    folder = source.is_dir()
    known = Status(out).records
    made = {
        name for name, record in known.items() if there(out / name) and _is_ours(out / name, record)
    }
    place = place_of(out)
    if folder:
        entries, problems = _found(source, base, made, place)
    else:
        entries, problems = read_manifest(source), {}
    own = [entry.name for entry in entries]
    check_names([*own, *(made - {*own, *problems})], source, place)
    jobs = []
    for entry in entries:
        before = known.get(entry.name)
        done = before.input if before is not None and before.state == "done" else None
        output = out / entry.name
        job = Job(
            name=entry.name,
            run=entry.run,
            base=entry.base or (None if base is None else absolute(base)),
            to=entry.to or to,
            target=target,
            output=output,
            done=None if force else done,
            ours=before is not None and _is_ours(output, before),
        )
        jobs.append(job)
    named = {name for job in jobs for name in (job.run, job.base) if name is not None}
    inputs = {Path(name).resolve() for name in named if there(Path(name))}
    if folder:
        inputs.add(source.resolve())
    top = out.resolve()
    near = [path for path in inputs if path.is_relative_to(top) or top.is_relative_to(path)]
    for job in jobs:
        _check_no_link(job)
        if job.ours:
            check_place(job.output, near)
        else:
            check_output(job.output, force, near)
    if not force:
        _check_own(out)
    return Batch(out, jobs, problems)


def _check_own(out: Path) -> None:
    """Raise `OutputError` where something lies in `out` that no batch wrote."""
    with reading(out, OutputError):
        if not out.exists() or (out / FILE).exists():
            return
        others = sorted(path.name for path in out.iterdir() if path.name != f".{FILE}")
    if others:
        raise OutputError(
            "the output folder is not empty, and no batch wrote into it",
            file=out,
            found=", ".join(others[:3]),
            remedy="choose another, or pass `force` to write beside what is there",
        )


def _check_no_link(job: Job) -> None:
    for path in (job.output, *job.output.parents[: job.name.count("/")]):
        if path.is_symlink():
            raise ManifestError(
                "an output would be written through a link",
                file=path,
                found=path.readlink(),
                remedy="remove the link",
            )


def _is_ours(output: Path, before: Record) -> bool:
    """Whether a batch made `output`, so far as is known: not all that it tried came to be."""
    return before.state == "done" or (output / CERTIFICATE).is_file()


def _found(
    root: Path, base: str | None, made: Collection[str], place: Place
) -> tuple[list[Entry], Mapping[str, str]]:
    from dora_serve.folder.inventory import discover

    found = discover(root, base)
    if not found.members and not found.problems:
        raise MissingError("no run in this folder", file=root, remedy="give a folder of runs")
    members = _named_apart(found.members, root, made, place)
    problems = {**found.problems, **_without_place(members, made, place)}
    entries = [
        Entry(absolute(str(member.path)), name, absolute(str(member.base.path)))
        for name, member in members.items()
        if name not in problems
    ]
    return entries, {printable(name): printable(said) for name, said in problems.items()}


def _named_apart(
    members: Mapping[str, Member], root: Path, made: Collection[str], place: Place
) -> dict[str, Member]:
    """What the output of each is called: its name or, where the output would be in another's place,
    its path below `root`. What an earlier batch made stays where it is."""
    named = dict(members)
    while True:
        met = meeting(list(named), place) - {*made}
        below = {name: named[name].path.relative_to(root).as_posix() for name in met}
        moved = {name: path for name, path in below.items() if path not in named}
        if not moved:
            return named
        named = {moved.get(name, name): member for name, member in named.items()}


def _without_place(
    members: Mapping[str, Member], made: Collection[str], place: Place
) -> dict[str, str]:
    """Why there is no output of a member: it has no possible name, or one that meets another's,
    where what was made before stays, and the first comes first."""
    unnamed = f"{NO_NAME}\n  expected: {EXPECTED}\n  to do: rename the folder"
    problems = {name: unnamed for name in members if not is_possible(name)}
    possible = [name for name in members if name not in problems]
    earlier = [name for name in made if name not in members]
    met = meeting([*earlier, *possible], place)
    placed = [name for name in earlier if name in met]
    for name in sorted((n for n in possible if n in met), key=lambda name: name not in made):
        other = next((each for each in placed if meet(place(name), place(each))), None)
        if other is None:
            placed.append(name)
        else:
            problems[name] = (
                f"its output would be in the place of another's\n  found: {other} and {name}\n"
                "  to do: rename the folder, or choose another output folder"
            )
    return problems
