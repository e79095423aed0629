"""One folder (or file) at a URL: its files, and copies of them to and from this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

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
_WEB = ("http", "https")
# A web server's date is told in whole seconds, of whatever the server calls a change.
_DATES = ("Last-Modified",)
_STALLED = 120.0  # seconds in which nothing comes
_AT_ONCE = 16  # files that a web server is asked about
_FOLDERS, _DEEP = 1000, 32  # that a web server may list, and in one another
_NAME_BYTES = 255


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL. `state`: what tells it from its next version, as far as the protocol tells;
    `lasting`: whether that is enough to know it again."""

    path: str
    size: int | None
    state: str
    lasting: bool


class Store:
    """The folder (or file) at `url`. Every method raises `DoraExportError` only."""

    def __init__(self, url: str, *, writing: bool = False) -> None:
        self.name = shown(url)
        self._protocol = url.partition("://")[0].rpartition("::")[2]
        with self._errors("opened"):
            found = url_to_fs(url, **_web_options(url))
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

    @property
    def local(self) -> Path | None:
        """Where the URL leads on this machine; None where it is another's."""
        return Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    def overlaps(self, other: Store | Path) -> bool:
        """Whether one of the two lies in the other, or is it."""
        (files, here), (others, there) = (
            self._place(),
            other._place() if isinstance(other, Store) else (None, f"{os.path.realpath(other)}/"),
        )
        return files == others and (here.startswith(there) or there.startswith(here))

    def _place(self) -> tuple[Any, str]:
        """The file system (None: this machine's) and the path there."""
        if self.local is not None:
            return None, f"{os.path.realpath(self.local)}/"
        return self._files, f"{self._root}/"

    def files(self) -> dict[str, RemoteFile]:
        """The files below the URL by their paths there, as they are now; "" is the URL itself."""
        with self._errors("listed"):
            self._files.invalidate_cache()
            try:
                if self._protocol in _BUCKETS or self.local is not None:
                    found = self._files.find(self._root, detail=True)
                else:
                    found = self._listed()
            except FileNotFoundError:
                if self._protocol in _BUCKETS:  # a bucket that is missing, not a folder
                    raise
                found = {}
            if self._protocol in _WEB:  # its listing has names alone
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    found = dict(zip(found, pool.map(self._asked, found), strict=True))
        files = {}
        for path, info in found.items():
            size = info.get("size")
            if info.get("type") == "directory" or (path.endswith("/") and not size):
                continue
            files[self._relative(path)] = RemoteFile(path, size, *_state(info))
        for name in files:
            parents = name.split("/")[:-1]
            above = ("/".join(parents[:depth]) for depth in range(len(parents) + 1))
            if name and any(path in files for path in above):
                raise RemoteError(
                    "a name is that of a file and of a folder", file=self.name, found=name
                )
        return files

    def _listed(self) -> dict[str, Any]:
        """The files that the lists of a server's folders lead to. One that lists a folder in
        itself, under whatever name, would lead on without end; and of a folder that is refused
        nothing is known, where fsspec's own walk takes it for an empty one."""
        found: dict[str, Any] = {}
        folders = [self._root]  # which grows
        for folder in folders:
            for info in self._list(folder):
                name = str(info["name"])
                below = name[len(self._root) :]
                # With "?" a web server's page is the listing itself, in another order.
                if ("?" in below and self._protocol in _WEB) or below.rstrip("/").endswith("/."):
                    continue
                if info["type"] != "directory":
                    found[name] = info
                elif (inside := name.rstrip("/")) != folder:
                    folders.append(inside)
            deep = folder[len(self._root) :].count("/") > _DEEP
            if deep or len(folders) > _FOLDERS:
                raise RemoteError(
                    "the server lists more folders than a model has, or one in itself",
                    file=self.name,
                    found=shown(folders[-1])[-200:],
                    expected=f"at most {_FOLDERS} folders, {_DEEP} in one another",
                    remedy="give the URL of the folder that holds the files",
                )
        return found or ({self._root: {}} if self._protocol in _WEB else {})

    def _list(self, folder: str) -> Any:
        try:
            return self._files.ls(folder, detail=True)
        except Exception as error:  # of whatever kind: FTP's own is a name that has no value
            if folder == self._root:
                raise
            raise RemoteError(
                "a folder that the server lists is not there, or is refused",
                file=shown(folder),
                found=f"{type(error).__name__}: {said(error)}",
                remedy="run again when nothing writes there, or with the rights to read it",
            ) from None

    def _asked(self, path: str) -> Mapping[str, Any]:
        """What a web server says of a file without sending it."""
        try:
            info: Mapping[str, Any] = self._files.info(path)
        except FileNotFoundError as error:  # whatever it was
            if getattr(error.__cause__, "status", 404) == 404 or error.__cause__ is None:
                raise
            raise error.__cause__ from None
        return info

    def check_free(self) -> None:
        """Raise `OutputError` when something is here: nothing at a URL is replaced."""
        if found := self.files():
            raise OutputError(
                "something is at the output's URL already, and nothing at a URL is replaced",
                file=self.name,
                found="a file" if "" in found else f"{len(found)} files",
                remedy="write to a new URL, or remove what is there with the store's own tool, "
                "such as `aws s3 rm --recursive`",
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
            self._files.get(sources, [str(place) for place in places], callback=_counters(advance))
        for place, file in zip(places, files.values(), strict=True):
            if not place.is_file() or file.size not in (None, place.stat().st_size):
                raise RemoteError(
                    "a file did not arrive whole",
                    file=shown(file.path),
                    expected=f"{file.size} bytes",
                    remedy="run again",
                )

    def upload(self, source: Path, advance: Callable[[int], None]) -> None:
        """Put the files of the folder `source` here, where nothing is: the configurations after all
        others, the certificate when those have arrived. On failure what was put is removed.

        One file after the other: of several at a time, those under way when one fails would leave
        the parts they have sent, which no listing shows.
        """
        sizes = {
            path.relative_to(source).as_posix(): path.stat().st_size
            for path in source.rglob("*")
            if path.is_file()
        }
        put: list[str] = []
        with self._errors("written"):
            self.check_free()
            try:
                for name in sorted(sizes, key=_wave):
                    if name == FILE:
                        self._check_arrived({n: sizes[n] for n in put})
                    put.append(name)
                    sent = _counter(advance)
                    path = f"{self._root}/{name}"
                    if self._protocol not in _BUCKETS:  # there it would make the bucket
                        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                    self._files.put_file(str(source / name), path, callback=sent)
                    advance(sizes[name] - sent.value)  # not every protocol tells
                self._check_arrived(sizes)
            except BaseException:
                self._remove(reversed(put))
                raise

    def _check_arrived(self, sizes: Mapping[str, int]) -> None:
        present = self.files()
        for name, size in sizes.items():
            file = present.get(name)
            if file is None or file.size not in (None, size):
                raise RemoteError(
                    "a file did not arrive whole",
                    file=f"{self.name.rstrip('/')}/{name}",
                    found="nothing" if file is None else f"{file.size} bytes",
                    expected=f"{size} bytes",
                    remedy="run again when nothing else writes there",
                )

    def _remove(self, names: Iterable[str]) -> None:
        """Remove what can be of files that were put here, and the folders they leave empty."""
        folders = {self._root}
        for name in names:
            with suppress(Exception):
                self._files.rm_file(f"{self._root}/{name}")
            parts = name.split("/")[:-1]
            folders |= {"/".join([self._root, *parts[: n + 1]]) for n in range(len(parts))}
        if self._protocol not in _BUCKETS:
            self._files.invalidate_cache()
            for folder in sorted(folders, reverse=True):
                with suppress(Exception):
                    if not self._files.ls(folder):  # some protocols' rmdir takes what is inside too
                        self._files.rmdir(folder)

    def _relative(self, path: str) -> str:
        if path == self._root:
            return ""
        name = path.removeprefix(self._root + "/")
        if name != path and self._protocol in _WEB:
            name = unquote(name)
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


def _web_options(url: str) -> dict[str, Any]:
    """What fsspec is told of web servers: by itself it lets no file take more than five minutes,
    and a list of a folder be of any length."""
    used = [name for name in _WEB if f"::{name}://" in f"::{url}"]
    if not used:
        return {}
    from aiohttp import ClientTimeout
    from fsspec.config import conf

    from .page import Page

    timeout = ClientTimeout(sock_connect=_STALLED, sock_read=_STALLED)
    own = {"timeout": timeout, "response_class": Page}
    known = {name: conf.get(name, {}).get("client_kwargs", {}) for name in used}
    return {name: {"client_kwargs": {**own, **more}} for name, more in known.items()}


def _state(info: Mapping[str, Any]) -> tuple[str, bool]:
    """What tells a file from its next version, and whether it is known again by that."""
    known = [str(info[name]) for name in _STATES if info.get(name) is not None]
    dates = [str(info[name]) for name in _DATES if info.get(name) is not None]
    return " ".join([str(info.get("size")), *known[:1], *dates]), bool(known)


def _wave(name: str) -> int:
    """0, 1 or 2: when a file is uploaded, so that nothing looks whole before it is."""
    return 2 if name == FILE else int(name.rsplit("/", 1)[-1] in _CONFIGS)


def _can_name_a_file(name: str) -> bool:
    return (
        name not in ("", ".", "..") and name.isprintable() and len(os.fsencode(name)) <= _NAME_BYTES
    )


def _counter(advance: Callable[[int], None]) -> Any:
    """Tells `advance` the bytes of one file as they come or go."""
    told = 0

    def count(_size: int | None, value: int) -> None:
        nonlocal told
        advance(value - told)
        told = value

    return Callback(hooks={"bytes": count})


def _counters(advance: Callable[[int], None]) -> Any:
    """The same of several files."""
    files = Callback()
    files.branched = lambda *_names, **_options: _counter(advance)
    return files
