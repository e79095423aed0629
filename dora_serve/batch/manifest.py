"""Which runs are to be converted: read from a manifest, or found in a folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from converters.errors import DoraExportError
from converters.files.handles import check_file, tells_case_apart, there
from converters.files.json_files import unique_keys
from converters.targets.target import targets

ADAPTER = "adapter"  # for the target that the command names
Place = Callable[[str], str]
_KEYS = {"run", "base", "name", "to"}
_LARGEST = 100_000_000
_LONGEST = 200  # bytes of a folder's name; the hidden one it is written in has some more
_DEEPEST = 1000  # bytes of a path below the output folder
NO_NAME = "a run's name must be a path below the output folder"
EXPECTED = f"printable; no backslash, no part empty, over {_LONGEST} bytes, or with a dot first"


class ManifestError(DoraExportError, ValueError):
    """The manifest is not one, or names its runs so that their outputs cannot be told apart."""


@dataclass(frozen=True)
class Entry:
    """A run, by folder or hub id, and how its output is called. None: not said."""

    run: str
    name: str
    base: str | None = None
    to: str | None = None


def forms() -> list[str]:
    """What can be made of a run: an adapter, or one of the targets that are whole models."""
    return [ADAPTER, *(name for name, target in targets().items() if target.kind == "model")]


def read_manifest(path: Path) -> list[Entry]:
    """The entries of a manifest: JSON lines or one JSON list of `{run, base, name, to}`.

    A path in it is relative to the current folder, as on the command line. Raises `ManifestError`
    with the line or the number of the entry.
    """
    known = forms()  # which asks every installed package
    entries = [_entry(path, where, value, known) for where, value in _values(path)]
    if not entries:
        raise ManifestError("the manifest names no run", file=path)
    return entries


def check_names(names: Sequence[str], source: Path, place: Place) -> None:
    """Raise `ManifestError` unless every name is a folder of its own below the output."""
    for name in names:
        if not is_possible(name):
            raise ManifestError(
                NO_NAME,
                file=source,
                found=repr(name),
                expected=EXPECTED,
                remedy='give another "name"',
            )
    met = meeting(names, place)
    for name in (name for name in names if name in met):
        raise ManifestError(
            "two runs would be written to one place",
            file=source,
            found=" and ".join(other for other in names if meet(place(name), place(other))),
            remedy='give each entry another "name"',
        )


def place_of(out: Path) -> Place:
    """What tells outputs in `out` apart by their names: on some disks `Run` and `run` are one."""
    return str if tells_case_apart(out) else lambda name: normalize("NFC", name).casefold()


def meeting(names: Sequence[str], place: Place) -> set[str]:
    """Those of `names` whose place is another's too, lies in one, or holds one."""
    places = [place(name) for name in names]
    known = Counter(places)
    holding = {str(above) for each in places for above in PurePosixPath(each).parents}
    return {
        name
        for name, own in zip(names, places, strict=True)
        if known[own] > 1
        or own in holding
        or any(str(above) in known for above in PurePosixPath(own).parents)
    }


def meet(one: str, other: str) -> bool:
    """Whether one of two places is the other, or in it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def is_possible(name: str) -> bool:
    """Whether an output can be called `name`."""
    parts = name.split("/")
    return (
        all(_is_part(part) for part in parts)
        and len(name.encode()) <= _DEEPEST
        and parts[0] != "batch.json"
    )


def absolute(folder_or_id: str) -> str:
    """The same folder seen from any process; a hub id as it is."""
    path = Path(folder_or_id)
    return str(path.absolute()) if there(path) else folder_or_id


def _is_part(part: str) -> bool:
    plain = part.isprintable() and "\\" not in part and not part.startswith(".")
    return bool(part) and plain and len(part.encode()) <= _LONGEST


def _values(path: Path) -> Iterator[tuple[str, object]]:
    if check_file(path) > _LARGEST:
        raise ManifestError("too large for a manifest", file=path, expected="at most 100 MB")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ManifestError(f"cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8: {error}", file=path) from None
    if text.lstrip().startswith("["):
        values = _parse(text, path, "the list")
        assert isinstance(values, list)
        yield from ((f"entry {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line, path, f"line {number}")


def _parse(text: str, path: Path, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{where} is not valid JSON: {error}",
            file=path,
            expected='an object such as {"run": "runs/a", "base": "base"} on each line, or one '
            "list of them",
        ) from None


def _entry(path: Path, where: str, value: object, known: Sequence[str]) -> Entry:
    if not isinstance(value, dict):
        raise ManifestError(f"{where} is not an object", file=path, found=_short(value))
    if unknown := value.keys() - _KEYS:
        raise ManifestError(
            f"{where} has keys that mean nothing",
            file=path,
            found=", ".join(sorted(unknown)),
            expected=", ".join(sorted(_KEYS)),
        )
    said = {key: said for key, said in value.items() if said is not None}
    for key, text in said.items():
        if not isinstance(text, str) or not text or "\0" in text:
            raise ManifestError(f"{where}: {key} is not a name", file=path, found=_short(text))
    if "run" not in said:
        raise ManifestError(f"{where} names no run", file=path, found=_short(value))
    if said.get("to", ADAPTER) not in known:
        raise ManifestError(
            f"{where}: no such form", file=path, found=said["to"], expected=" or ".join(known)
        )
    name = said.get("name", Path(os.path.abspath(said["run"])).name)  # noqa: PTH100 keeps links
    base = said.get("base")
    return Entry(
        absolute(said["run"]), name, None if base is None else absolute(base), said.get("to")
    )


def _short(value: object) -> str:
    return repr(value)[:200]
