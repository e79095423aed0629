"""Runs, models and artifacts at URLs (`s3://`, `hf://`, any fsspec protocol), by local copies.

An input is fetched into the cache before a command reads it; an output is made in the cache and
uploaded when the command has written it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import MissingError, OutputError

if TYPE_CHECKING:
    from .store import RemoteFile, Store

Advance = Callable[[int], None]
Progress = Callable[[int, str], AbstractContextManager[Advance]]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*://")
_VERDICTS = (None, 0, 1)
_COPIES = (_FETCHED, _MADE) = ("remote-", "upload-")
_ONCE = f"{_FETCHED}once"


@dataclass(frozen=True)
class Remote:
    """A place given as a URL: an input, or an output. `make` turns the local path into what the
    command takes."""

    url: str
    output: bool = False
    make: Callable[[Path], object] = Path


def is_url(text: object) -> bool:
    return isinstance(text, str) and _URL.match(text) is not None


@contextmanager
def local_values(values: Mapping[str, Any], progress: Progress) -> Iterator[dict[str, Any]]:
    """`values` with a local path for every `Remote` in it, alone or in a tuple.

    What is printed and raised meanwhile names the URLs. What goes to stdout is held back until the
    output is uploaded. Without a `Remote` nothing happens, and no network is touched.
    """
    remotes = [value for value in _flat(values.values()) if isinstance(value, Remote)]
    if not remotes:
        yield dict(values)
        return
    from .errors import shown
    from .naming import Printed, named_errors

    _check_apart(remotes, _flat(values.values()))
    paths: dict[Remote, Path] = {}
    names: dict[str, str] = {}
    printed = Printed(names, any(remote.output for remote in remotes), sys.stdout)
    try:
        with named_errors(names), contextlib.ExitStack() as stack:
            # The output first: that it cannot be written should be known before much is fetched.
            for remote in sorted(remotes, key=lambda remote: not remote.output):
                if remote.output:
                    place = uploaded(remote.url, names, progress)
                else:
                    place = fetched(remote.url, progress)
                paths[remote] = stack.enter_context(place)
                if _is_copy(paths[remote]):
                    names[str(paths[remote])] = shown(remote.url)
            stack.enter_context(contextlib.redirect_stdout(printed))
            stack.enter_context(contextlib.redirect_stderr(Printed(names, False, sys.stderr)))
            yield {name: _local(value, paths) for name, value in values.items()}
    except SystemExit as done:
        if done.code in _VERDICTS:
            printed.release()
        raise
    printed.release()


@contextmanager
def fetched(url: str, progress: Progress) -> Iterator[Path]:
    """A local copy of the folder (or file) at `url`, made unless the cache has it as it is now;
    what lies on this machine is read where it lies, so that no output can take its place.

    A copy that cannot be told from the next version is removed on leaving. Raises
    `DoraExportError` when nothing is there, access is denied, a name would lead out of the folder,
    or it changes meanwhile.
    """
    from converters.files.cache import cache_folder, private_cache
    from converters.files.output import check_place, output_folder, scratch

    from ..folder.cache import cached
    from .store import Store

    store = Store(url)
    if store.local is not None:
        if not store.local.exists():
            raise MissingError("nothing at this URL", file=store.name)
        yield store.local
        return
    files = store.files()
    if not files:
        raise MissingError("nothing at this URL", file=store.name, expected="a folder or a file")
    versions = _versions(files)
    size = sum(file.size or 0 for file in files.values())
    digest = _digest(f"{url}\n{sorted(versions.items())}")
    key = f"{_FETCHED}{digest}"

    def fetch(part: Path) -> None:
        check_place(part, (), size)
        with progress(size, f"fetching {store.name}") as advance:
            store.download(files, part / store.basename, advance)
            if _versions(store.files()) != versions:
                raise OutputError(
                    "the files changed while they were fetched",
                    file=store.name,
                    remedy="run again when nothing writes there",
                )

    def make(folder: Path) -> None:
        with output_folder(folder) as part:
            fetch(part)

    if all(file.lasting for file in files.values()):
        cached(key, make)
        yield cache_folder().resolve() / key / store.basename
        return
    with scratch(private_cache().resolve() / _ONCE) as part:
        fetch(part / "copy")
        yield part / "copy" / store.basename


@contextmanager
def uploaded(url: str, names: Mapping[str, str], progress: Progress) -> Iterator[Path]:
    """A local path to make an output folder at; on leaving, what was made is uploaded to `url`.

    `names`: URL of each local path that must not stand in the artifact. Raises `OutputError` when
    something is at `url`.
    """
    from converters.files.cache import private_cache
    from converters.files.handles import reading
    from converters.files.output import addition

    from .naming import name_in_files
    from .store import Store

    store = Store(url, writing=True)
    scratch = private_cache().resolve() / f"{_MADE}{_digest(url)}"
    with reading(scratch, OutputError):
        scratch.mkdir(exist_ok=True)
    _remove_leftovers()
    with addition(scratch) as folder:
        store.check_free()
        target = folder / store.basename
        verdict: SystemExit | None = None
        try:
            yield target
        except SystemExit as done:
            if done.code not in _VERDICTS:
                raise
            verdict = done
        if target.exists():
            name_in_files(target, names)
            sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
            with progress(sum(sizes), f"uploading {store.name}") as advance:
                store.upload(target, advance)
        if verdict is not None:
            raise verdict


def needs_local(path: Path, option: str) -> None:
    """Raise `OutputError` when `path` is the copy of a URL, which `option` would write into."""
    if _is_copy(path):
        raise OutputError(
            f"{option} changes an artifact in place, which a URL has not",
            file=path,
            expected="a local folder",
            remedy="copy the artifact, change the copy and upload that",
        )


def _is_copy(path: Path) -> bool:
    """Whether `path` is in a copy of what is at a URL, or one that is to be uploaded."""
    from converters.files.cache import cache_folder

    try:
        real, cache = path.resolve(), cache_folder().resolve()
    except OutputError:  # no cache, no copy
        return False
    return any(
        above.parent == cache and above.name.removeprefix(".").startswith(_COPIES)
        for above in real.parents
    )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


def _local(value: Any, paths: Mapping[Remote, Path]) -> Any:
    if isinstance(value, Remote):
        return value.make(paths[value])
    if isinstance(value, tuple):
        return tuple(_local(each, paths) for each in value)
    return value


def _check_apart(remotes: Iterable[Remote], values: Iterable[Any]) -> None:
    """Raise `OutputError` when an output lies in an input, which it would change, or holds one."""
    from .errors import shown
    from .store import Store

    inputs: dict[str, Store | Path] = {
        shown(remote.url): Store(remote.url) for remote in remotes if not remote.output
    }
    # Text is a folder, a hub's id, or either with a name before it.
    for value in (value for value in values if isinstance(value, str | Path)):
        for text in (str(value), str(value).partition("=")[2]):
            with contextlib.suppress(OSError, ValueError):
                if text and Path(text).exists():
                    inputs[text] = Path(text)
    for output in (remote for remote in remotes if remote.output):
        place = Store(output.url, writing=True)
        for name, source in inputs.items():
            if place.overlaps(source):
                raise OutputError(
                    "the output would lie inside an input, or hold it",
                    file=place.name,
                    found=f"input {name}",
                    remedy="choose an output URL of its own",
                )


def _remove_leftovers() -> None:
    """Remove what killed commands were to upload."""
    from converters.files.cache import cache_folder

    for scratch in cache_folder().glob(f"{_MADE}*"):
        with contextlib.suppress(OSError):
            lock = os.open(scratch, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in scratch.iterdir():
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _versions(files: Mapping[str, RemoteFile]) -> dict[str, str]:
    return {name: file.state for name, file in files.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
