"""The journal of a merge: which of its shards are whole, so that a killed one can be continued.

JSON lines beside the shards: first the key of the merge, then each shard that is on the disk, with
the hash of every byte. Nothing in it is believed that the files do not confirm.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...certificate import sha256, tool
from ...files.hashes import file_hash, is_telling
from ...files.leftovers import JOURNAL
from ...files.tensors import byte_view
from ...updates.update import Update
from .stream import Rounding

if TYPE_CHECKING:
    from .plan import MergePlan

_PROBED_ROWS = 16


class Journal:
    """The journal of the merge `plan` in `folder`, where nothing else is left but whole shards.

    `finished`: these shards, with the rounding of their modules. `notes`: what of a killed merge is
    made anew, and why.
    """

    def __init__(self, folder: Path, plan: MergePlan) -> None:
        self._path = folder / JOURNAL
        self.finished: dict[str, dict[str, Rounding]] = {}
        self.notes: tuple[str, ...] = ()
        header: dict[str, object] = {"key": _key(plan)}
        lines = list(_lines(self._path))
        entries = {str(line.get("shard")): line for line in lines[1:]}
        if lines and lines[0] != header:
            self.notes = ("a killed merge was of another run, base, dtype or version: all is new",)
            entries = {}
        names = [name for name in plan.shards if name in entries]
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: _rounding(folder / name, entries[name]), names)
            for name, rounding in zip(names, found, strict=True):
                if rounding is None:
                    self.notes += (f"{name} is not what the killed merge wrote: it is made anew",)
                else:
                    self.finished[name] = rounding
        _clear(folder, {JOURNAL, *self.finished})
        kept = (header, *(entries[name] for name in self.finished))
        new = folder / f"{JOURNAL}.new"
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        new.replace(self._path)

    def add(self, shard: str, rounding: Mapping[str, Rounding]) -> None:
        """Note that `shard` is on the disk."""
        path = self._path.parent / shard
        entry = {
            "shard": shard,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "rounding": {module: asdict(report) for module, report in rounding.items()},
        }
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _lines(path: Path) -> Iterator[dict[str, object]]:
    """The objects of a journal, up to a line that was not written whole."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        yield value


def _rounding(path: Path, entry: Mapping[str, object]) -> dict[str, Rounding] | None:
    """The rounding of a shard's modules; None unless the file is the one that `entry` describes."""
    reports = entry.get("rounding")
    if path.is_symlink() or not path.is_file() or not isinstance(reports, dict):
        return None
    if path.stat().st_size != entry.get("bytes") or sha256(path) != entry.get("sha256"):
        return None
    try:
        return {module: Rounding(**report) for module, report in reports.items()}
    except TypeError:
        return None


def _clear(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def _key(plan: MergePlan) -> str:
    """A hash of all that the bytes of the shards depend on."""
    run = plan.run
    digest = hashlib.sha256()
    tensors = [
        (shard, t.name, str(t.dtype), t.module, t.transposed)
        for shard, tensors in plan.shards.items()
        for t in tensors
    ]
    # Files of the same state have the same content; hashing it first would read the base twice.
    paths = {*(t.source.path for t in plan.tensors), *(plan.base.stored or ())}
    stats = {str(path): path.stat() for path in paths}
    said = {
        "tool": [tool(), torch.__version__],
        "run": [run.method, *((path.name, sha256(path)) for path in run.files)],
        "sources": sorted(
            (path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
            if is_telling(s)
            else (path, file_hash(Path(path)))
            for path, s in stats.items()
        ),
        "tensors": tensors,
    }
    digest.update(json.dumps(said).encode())
    for module, update in run.updates.items():
        digest.update(module.encode())
        for part in _content(update):
            digest.update(byte_view(part.contiguous()))
    return digest.hexdigest()


def _content(update: Update) -> tuple[torch.Tensor, ...]:
    """Tensors that show what the update does: it also depends on options that no file holds."""
    parts = update.components()
    if parts is not None:
        return parts.a, parts.c, parts.b
    rows, columns = update.shape
    probed = rows if update.whole else min(rows, _PROBED_ROWS)
    return (update.merge(torch.ones(probed, columns), 0),)
