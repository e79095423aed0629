"""One folder (or file) at a URL: its files, and copies of them to and from this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any
from uuid import uuid4

from converters.certificate import FILE
from converters.errors import OutputError

from .errors import RemoteError, errors, said, shown

_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci")
_CONFIGS = ("config.json", "adapter_config.json", "genai_config.json")
# What tells a file from its next version, by the name each protocol has for it; best first.
_STATES = (
    *("ETag", "etag", "blob_id", "xet_hash", "md5Hash", "generation"),
    *("LastModified", "last_modified", "mtime", "updated", "created"),
)
# The folder below an output's URL where its replacement is made. It is no part of the artifact.
_STAGE = ".dora-tmp-"
_NAME_BYTES = 255
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL. `state` None: the protocol does not tell one version from the next."""

    path: str
    size: int | None
    state: str | None


class Store:
    """The folder (or file) at `url`. Every method raises `DoraExportError` only."""

    def __init__(self, url: str, *, writing: bool = False) -> None:
        self.name = shown(url)
        self._protocol = url.partition("://")[0].rpartition("::")[2]
        with self._errors("opened"):
            from fsspec.core import url_to_fs

            found = url_to_fs(url)
            self._files: Any = found[0]
            self._root = str(found[1]).rstrip("/")
        bucket = self._protocol in _BUCKETS and "/" not in self._root.strip("/")
        # What comes after "?" may be a signature: no name of a local file.
        self.basename = self._root.rsplit("/", 1)[-1].partition("?")[0]
        if not _can_name_a_file(self.basename) or (writing and bucket):
            raise RemoteError(
                "the URL names no folder",
                file=self.name,
                expected=f"{self._protocol}://…/folder",
            )

    def overlaps(self, other: Store | Path) -> bool:
        """Whether one of the two lies in the other, or is it."""
        (files, here), (others, there) = (
            self._place(),
            other._place() if isinstance(other, Store) else (None, f"{os.path.realpath(other)}/"),
        )
        return files == others and (here.startswith(there) or there.startswith(here))

    def _place(self) -> tuple[Any, str]:
        """The file system (None: this machine's) and the path there."""
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._files, LocalFileSystem):
            return None, f"{os.path.realpath(self._root)}/"
        return self._files, f"{self._root}/"

    def files(self) -> dict[str, RemoteFile]:
        """The files below the URL by their paths there, as they are now; "" is the URL itself."""
        return {n: file for n, file in self._listing().items() if not n.startswith(_STAGE)}

    def left_by_stopped(self) -> str | None:
        """Where a replacement that was stopped half-way left the old artifact and the new one."""
        stages = {n.partition("/")[0] for n in self._listing() if n.startswith(_STAGE)}
        return f"a stopped replacement's {', '.join(sorted(stages))}" if stages else None

    def check_free(self, force: bool) -> None:
        """Raise `OutputError` when an output may not be put here."""
        found = self._listing()
        if "" in found:
            raise OutputError(
                "the output is a file", file=self.name, expected="a folder, or nothing"
            )
        if found and not force:
            raise OutputError(
                "something is at the output's URL already",
                file=self.name,
                remedy="choose another, or pass --force to replace it",
            )

    def download(
        self, files: Mapping[str, RemoteFile], target: Path, advance: Callable[[int], None]
    ) -> None:
        """Copy `files` to the folder (or file) `target`."""
        places = [target / name if name else target for name in files]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        with self._errors("fetched"):
            sources = [file.path for file in files.values()]
            self._files.get(sources, [str(place) for place in places], callback=_files(advance))
        for place, file in zip(places, files.values(), strict=True):
            if not place.is_file() or file.size not in (None, place.stat().st_size):
                raise RemoteError(
                    "a file did not arrive whole",
                    file=shown(file.path),
                    expected=f"{file.size} bytes",
                    remedy="run again",
                )

    def upload(self, source: Path, force: bool, advance: Callable[[int], None]) -> None:
        """Put the files of the folder `source` here: the certificate last, the configurations
        before it. On failure what was uploaded is removed.

        With `force`, they take the place of all that is here, which stays until they have arrived
        whole beside it.
        """
        paths = (path for path in source.rglob("*") if path.is_file())
        sizes = {path.relative_to(source).as_posix(): path.stat().st_size for path in paths}
        with self._errors("written"):
            self.check_free(force)
            if self._listing():
                self._replace(source, sizes, advance)
                return
            try:
                self._put(source, "", sizes, advance)
            except BaseException:
                with suppress(Exception):
                    self._remove(sizes)
                raise

    def _replace(
        self, source: Path, sizes: Mapping[str, int | None], advance: Callable[[int], None]
    ) -> None:
        stage = f"{_STAGE}{uuid4().hex[:8]}/"
        before = self.files()
        old = {name: file.size for name, file in before.items()}
        try:
            self._put(source, f"{stage}new/", sizes, advance)
            self._copy("", f"{stage}old/", old)
            if self.files() != before:
                raise OutputError(
                    "what is at the URL changed while it was to be replaced",
                    file=self.name,
                    remedy="run again when nothing else writes there",
                )
        except BaseException:
            with suppress(Exception):
                self._remove_stages(stage)
            raise
        # Whoever stops us now waits: in the main thread a signal would leave it half done.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._switch, stage, old, sizes).result()

    def _switch(
        self, stage: str, old: Mapping[str, int | None], new: Mapping[str, int | None]
    ) -> None:
        """Put what is in the stage's `new` in the place of what is here, or leave that as it is."""
        before = self.files()
        try:
            self._remove(before)
            self._copy(f"{stage}new/", "", new)
        except Exception as failure:
            try:
                if self.files() != before:
                    self._remove(self.files())
                    self._copy(f"{stage}old/", "", old)
            except Exception:
                raise RemoteError(
                    "the replacement failed half-way, and so did putting the old artifact back",
                    file=self.name,
                    found=said(failure),
                    expected=f"both are whole in {self.name.rstrip('/')}/{stage}: old and new",
                    remedy="copy one of them to its place, or run again with --force",
                ) from failure
            with suppress(Exception):
                self._remove_stages(stage)
            raise
        try:
            self._remove_stages(_STAGE)
        except Exception as failure:
            raise RemoteError(
                "the new artifact is whole, but what it replaced could not be removed",
                file=self.name,
                found=said(failure),
                remedy=f"remove {self.name.rstrip('/')}/{_STAGE}*",
            ) from failure

    def _put(
        self,
        source: Path,
        to: str,
        sizes: Mapping[str, int | None],
        advance: Callable[[int], None],
    ) -> None:
        """Upload, one file after the other: of several at a time, those under way when one fails
        would leave the parts they have sent, which no listing shows."""
        for name in self._in_order(to, sizes):
            sent = _bytes(advance)
            self._files.put_file(str(source / name), self._path(to + name), callback=sent)
            advance((sizes[name] or 0) - sent.told)  # not every protocol tells

    def _copy(self, source: str, to: str, sizes: Mapping[str, int | None]) -> None:
        """Copy within the store, without the bytes coming here where the protocol can."""
        for name in self._in_order(to, sizes):
            here, there = f"{self._root}/{source}{name}", self._path(to + name)
            try:
                self._files.cp_file(here, there)
            except NotImplementedError:
                with self._files.open(here, "rb") as read, self._files.open(there, "wb") as write:
                    shutil.copyfileobj(read, write, _CHUNK)

    def _in_order(self, to: str, sizes: Mapping[str, int | None]) -> Iterator[str]:
        """The names in the order of writing; the certificate when all others have arrived."""
        others = {name: size for name, size in sizes.items() if _wave(name) < 2}
        yield from sorted(others, key=_wave)
        self._check_arrived(to, others)
        if len(others) < len(sizes):
            yield FILE
            self._check_arrived(to, sizes)

    def _path(self, name: str) -> str:
        """The path of a file that is to be written, its folder made."""
        path = f"{self._root}/{name}"
        if self._protocol not in _BUCKETS:  # there it would make the bucket
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def _check_arrived(self, to: str, sizes: Mapping[str, int | None]) -> None:
        present = self._listing()
        for name, size in sizes.items():
            file = present.get(to + name)
            if file is None or (file.size is not None and file.size != size):
                raise RemoteError(
                    "a file did not arrive whole",
                    file=f"{self.name.rstrip('/')}/{to}{name}",
                    found="nothing" if file is None else f"{file.size} bytes",
                    expected=f"{size} bytes",
                    remedy="run again when nothing else writes there",
                )

    def _remove_stages(self, prefix: str) -> None:
        self._remove([name for name in self._listing() if name.startswith(prefix)])

    def _remove(self, names: Collection[str]) -> None:
        """Remove those of `names` that are here, the certificate first, and folders left empty."""
        present = self._listing()
        for wave in (2, 1, 0):
            paths = [present[n].path for n in names if n in present and _wave(n) == wave]
            # Of several paths fsspec makes patterns, where it takes several.
            several = [p for p in paths if self._protocol in _BUCKETS and not has_magic(p)]
            if several:
                self._files.rm(several)
            for path in paths:
                if path not in several:
                    self._files.rm_file(path)
        if self._protocol not in _BUCKETS:
            self._remove_empty_folders()

    def _remove_empty_folders(self) -> None:
        self._files.invalidate_cache()
        with suppress(FileNotFoundError):
            found = self._files.find(self._root, withdirs=True, detail=True)
            folders = {path for path, i in found.items() if i.get("type") == "directory"}
            for folder in sorted({*folders, self._root}, reverse=True):
                # Some protocols' rmdir takes what is inside too.
                if not any(path.startswith(f"{folder}/") for path in {*found} - folders):
                    with suppress(Exception):
                        self._files.rmdir(folder)

    def _listing(self) -> dict[str, RemoteFile]:
        """All files, those of stages too."""
        with self._errors("listed"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root, detail=True)
                if not found and self._protocol in ("http", "https"):
                    self._files.cat_file(self._root, 0, 1)  # its listing hides why it is empty
            except FileNotFoundError:
                if self._protocol in _BUCKETS:  # a bucket that is missing, not a folder
                    raise
                found = {}
        files = {}
        for path, info in found.items():
            size = info.get("size")
            if info.get("type") == "directory" or (path.endswith("/") and not size):
                continue
            files[self._relative(path)] = RemoteFile(path, size, _state(info))
        for name in files:
            parents = name.split("/")[:-1]
            above = ("/".join(parents[:depth]) for depth in range(len(parents) + 1))
            if name and any(path in files for path in above):
                raise RemoteError(
                    "a name is that of a file and of a folder", file=self.name, found=name
                )
        return files

    def _relative(self, path: str) -> str:
        if path == self._root:
            return ""
        name = path.removeprefix(self._root + "/")
        if name == path or not all(_can_name_a_file(part) for part in name.split("/")):
            raise RemoteError(
                "a name there would lead out of the folder, or is none a file can have",
                file=self.name,
                found=repr(name),
                remedy="remove or rename it",
            )
        return name

    def _errors(self, done: str) -> AbstractContextManager[None]:
        return errors(self.name, self._protocol, done)


def _state(info: Mapping[str, Any]) -> str | None:
    known = [str(info[name]) for name in _STATES if info.get(name) is not None]
    return f"{info.get('size')} {known[0]}" if known else None


def _wave(name: str) -> int:
    """0, 1 or 2: when a file is uploaded, so that nothing looks whole before it is."""
    return 2 if name == FILE else int(name.rsplit("/", 1)[-1] in _CONFIGS)


def _can_name_a_file(name: str) -> bool:
    return (
        name not in ("", ".", "..") and name.isprintable() and len(os.fsencode(name)) <= _NAME_BYTES
    )


def _bytes(advance: Callable[[int], None]) -> Any:
    from fsspec.callbacks import NoOpCallback

    class Bytes(NoOpCallback):  # type: ignore[misc]
        """Counts the bytes of one file."""

        told = 0

        def call(self, *_names: object, **_values: object) -> None:
            advance(self.value - self.told)
            self.told = self.value

    return Bytes()


def _files(advance: Callable[[int], None]) -> Any:
    from fsspec.callbacks import Callback

    class Files(Callback):  # type: ignore[misc]
        def branched(self, _source: str, _target: str, **_options: object) -> Any:
            return _bytes(advance)

    return Files()
