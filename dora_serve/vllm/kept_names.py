"""The names of the runs of a folder that is followed, kept for whoever follows it next."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from converters.errors import OutputError
from converters.files.cache import cache_folder, private_cache
from converters.files.handles import there


class KeptNames:
    """Which run has which name, kept beside the cache: a run that was served by a name keeps it
    while it is there, whatever comes to be called so too, and whoever follows the folder."""

    def __init__(self, root: Path) -> None:
        self._called, self._file = root.name, links(root) / "names.json"
        self._kept: dict[str, str] = {}

    def of(
        self, root: Path, runs: Iterable[Path], own: Mapping[Path, str], reserved: Collection[str]
    ) -> dict[str, Path]:
        """Name → run, of those below `root`. `own`: what each is called by itself."""
        below = {path: path.relative_to(root).as_posix() for path in runs}
        with self._locked():
            with suppress(OSError, ValueError, AttributeError):
                self._kept = dict(json.loads(self._file.read_bytes()).items())
            # What another has found already, and we have not.
            others = {
                place: name
                for place, name in self._kept.items()
                if place not in below.values() and there(root / place)
            }
            named = {
                name: path
                for path, place in below.items()
                if (name := self._kept.get(place, "")) and name not in reserved
            }
            placed, taken = set(named.values()), {*named, *reserved, *others.values()}
            for path, place in below.items():
                if path not in placed:
                    names = (own[path], place, f"{self._called}/{place}", path.as_posix())
                    name = next(name for name in names if name not in taken)
                    taken.add(name)
                    named[name] = path
            kept = {**others, **{below[path]: name for name, path in named.items()}}
            if kept != self._kept:
                self._kept = kept
                with suppress(OSError):  # then they are kept as long as this process
                    new = self._file.with_suffix(f".{os.getpid()}")
                    new.write_text(json.dumps(kept), encoding="utf-8")
                    new.replace(self._file)
        return named

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep others from naming, where the cache can be used."""
        with ExitStack() as stack:
            with suppress(OutputError, OSError):
                private_cache()
                self._file.parent.mkdir(parents=True, exist_ok=True)
                lock = os.open(self._file.parent, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def links(root: Path) -> Path:
    """Where the adapters of `root` are linked to: what a server loaded from there is ours to
    unload, also after a restart, and nothing else is. Of a link: whatever it leads to by then."""
    own = root.absolute()
    place = own.parent.resolve() / own.name if own.is_symlink() else own.resolve()
    return cache_folder().resolve() / "watched" / sha256(bytes(place)).hexdigest()[:16]
