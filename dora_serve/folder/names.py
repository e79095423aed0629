"""What each thing in a folder is called: one rule for every command, engine and resolver.

1. What lies in the folder goes by its own name: its folder's, or the hub id where it lies as in the
   hub's cache. Where two things have that name, runs or bases, each goes by its path below the
   folder. Links are ways to a place and no names of it.
2. What lies elsewhere (the base that was given, or one of the hub's cache) goes by its own name
   too; where something in the folder has that, by as many folders more as tell it apart. So what
   lies elsewhere renames nothing in the folder.
3. An adapter inside an ONNX folder goes by its own name, else by `folder/adapter`.

4. A name is printable text, no part of it begins or ends with a blank, and no other spelling
   (`x/../run`, `run/`) is one.

The path below the folder names a thing at any time and never another one, whatever arrives later:
`Following.find` understands it beside the name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from converters.files.handles import real

_SNAPSHOT = re.compile(r"(?:.*/)?models--([^/]+)/snapshots/[^/]+")


def own_name(path: Path) -> str:
    """A folder's name where it really lies, or the hub id of a snapshot in the hub's cache."""
    place = real(path)
    snapshot = _SNAPSHOT.fullmatch(place.as_posix())
    return snapshot[1].replace("--", "/", 1) if snapshot else place.name


def not_a_name(name: str) -> str | None:
    """Why nothing can be called `name`: it would be another way to write a name, or could not be
    shown. None for what is a name."""
    if not name.isprintable():
        return "its name has signs that cannot be shown: rename the folder"
    if any(part in ("", ".", "..") or part != part.strip() for part in name.split("/")):
        return "its name has a part that is empty, or begins or ends with a blank"
    return None


def names_below(root: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """The name of every one of `paths`, which lie in `root` or are it, or are links out of it: what
    is said of such a link is said of its path."""
    top = real(root)
    here = [path for path in paths if real(path).is_relative_to(top)]
    below = {path: path.relative_to(root).as_posix() for path in here}
    own = {path: own_name(path) for path in here}
    known = Counter([*own.values(), *(b for path, b in below.items() if b != own[path])])
    names = {path: own[path] if known[own[path]] == 1 else below[path] for path in here}
    taken = set(names.values())
    for link in (path for path in paths if path not in names):
        place = link.relative_to(root).as_posix()
        names[link] = place if place not in taken else link.as_posix()
    return names


def name_elsewhere(path: Path, taken: Collection[str]) -> str:
    """The name of what does not lie in the folder, where the names `taken` are the folder's."""
    parts = real(path).parts
    longer = ["/".join(parts[-count:]) for count in range(2, len(parts))]
    names = (own_name(path), *longer, real(path).as_posix())
    return next(name for name in names if name not in taken)


def names_inside(
    folders: Mapping[str, Iterable[str]], taken: Collection[str]
) -> dict[tuple[str, str], str]:
    """(folder, adapter) → name, for the adapters inside ONNX folders of these names."""
    own = [(folder, adapter) for folder, adapters in folders.items() for adapter in adapters]
    known = Counter([*taken, *folders, *(adapter for _, adapter in own)])
    return {
        (folder, adapter): adapter if known[adapter] == 1 else f"{folder}/{adapter}"
        for folder, adapter in own
    }
