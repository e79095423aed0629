"""One folder (or file) at a URL: its files, and copies of them to and from this machine."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.certificate import FILE
from converters.errors import DoraExportError, MissingError

_S3 = ("s3", "s3a")
_BUCKETS = (*_S3, "gs", "gcs", "az", "abfs")
_LOCAL = ("file", "local")
_CONFIGS = ("config.json", "adapter_config.json", "genai_config.json")
# What tells a file from its next version, by the name each protocol has for it; best first.
_STATES = (
    *("ETag", "etag", "blob_id", "md5Hash", "generation"),
    *("LastModified", "last_modified", "mtime", "updated", "created"),
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NAME_BYTES = 255


class RemoteError(DoraExportError, OSError):
    """What is at a URL cannot be read or written."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL. `state` None: the protocol does not tell one version from the next."""

    path: str
    size: int | None
    state: str | None


def shown(text: str) -> str:
    """A URL, or text with URLs, without passwords and signatures."""
    return re.sub(r"\?[^\s'\">)]*", "?…", re.sub(r"://[^/@\s]*@", "://…@", text))


class Store:
    """The folder (or file) at `url`. Every method raises `DoraExportError` only."""

    def __init__(self, url: str, *, writing: bool = False) -> None:
        self.name = shown(url)
        self._protocol = url.partition("://")[0]
        with self._errors("opened"):
            from fsspec.core import url_to_fs

            # Asking for folders by makedirs would make buckets too.
            local = writing and self._protocol in _LOCAL
            found = url_to_fs(url, **({"auto_mkdir": True} if local else {}))
            self._files: Any = found[0]
            self._root = str(found[1]).rstrip("/")
        bucket = self._protocol in _BUCKETS and "/" not in self._root.strip("/")
        if not self._root.strip("/") or (writing and bucket):
            raise RemoteError(
                "the URL names no folder",
                file=self.name,
                expected=f"{self._protocol}://…/folder",
            )
        self.basename = self._root.rsplit("/", 1)[-1]

    def files(self) -> dict[str, RemoteFile]:
        """The files below the URL by their paths there, as they are now; "" is the URL itself."""
        with self._errors("listed"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root, detail=True)
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
            if (
                any("/".join(parents[:depth]) in files for depth in range(len(parents) + 1))
                and name
            ):
                raise RemoteError(
                    "a name is that of a file and of a folder", file=self.name, found=name
                )
        return files

    def download(
        self, files: Mapping[str, RemoteFile], target: Path, advance: Callable[[int], None]
    ) -> None:
        """Copy `files` to the folder (or file) `target`."""
        places = [target / name if name else target for name in files]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        with self._errors("fetched"):
            sources = [file.path for file in files.values()]
            self._files.get(sources, [str(place) for place in places], callback=_bar(advance))
        for place, file in zip(places, files.values(), strict=True):
            if not place.is_file() or file.size not in (None, place.stat().st_size):
                raise RemoteError(
                    "a file did not arrive whole",
                    file=shown(file.path),
                    expected=f"{file.size} bytes",
                    remedy="run again",
                )

    def upload(self, source: Path, advance: Callable[[int], None]) -> None:
        """Put the files of the folder `source` in the place of all that is here: the certificate
        last, the configurations before it. On failure what was uploaded is removed."""
        names = [
            path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()
        ]
        with self._errors("written"):
            self._remove(self.files())
            try:
                for wave in range(3):
                    group = [name for name in names if _wave(name) == wave]
                    if group:
                        self._files.put(
                            [str(source / name) for name in group],
                            [f"{self._root}/{name}" for name in group],
                            callback=_bar(advance),
                        )
            except BaseException:
                with suppress(Exception):
                    self._remove(names)
                raise

    def _remove(self, names: Collection[str]) -> None:
        """Remove those of `names` that are here, the certificate first."""
        present = self.files()
        for wave in (2, 1, 0):
            paths = [file.path for n, file in present.items() if n in names and _wave(n) == wave]
            if paths:
                self._files.rm(paths)

    def _relative(self, path: str) -> str:
        if path == self._root:
            return ""
        name = path.removeprefix(self._root + "/")
        parts = name.split("/")
        if (
            name == path
            or any(part in ("", ".", "..") or not part.isprintable() for part in parts)
            or any(len(os.fsencode(part)) > _NAME_BYTES for part in parts)
        ):
            raise RemoteError(
                "a name there would lead out of the folder, or is none a file can have",
                file=self.name,
                found=repr(name),
                remedy="remove or rename it",
            )
        return name

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Each protocol has exceptions of its own; from here on they are ours."""
        try:
            yield
        except DoraExportError:
            raise
        except ImportError as error:
            extra = "dora-serve[remote]" if self._protocol in _S3 else "the package named above"
            raise MissingError(
                f"a package for {self._protocol}:// is not installed",
                file=self.name,
                found=str(error),
                remedy=f"pip install {extra}",
            ) from None
        except FileNotFoundError as error:
            raise MissingError("nothing at this URL", file=self.name, found=_said(error)) from None
        except PermissionError as error:
            raise RemoteError(
                "access denied",
                file=self.name,
                found=_said(error),
                remedy=f"look after the credentials that fsspec finds for {self._protocol}://",
            ) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            raise RemoteError(
                f"cannot be {done}", file=self.name, found=f"{type(error).__name__}: {_said(error)}"
            ) from None


def _said(error: Exception) -> str:
    return shown(str(error).partition("\n")[0])[:300]


def _state(info: Mapping[str, Any]) -> str | None:
    known = [str(info[name]) for name in _STATES if info.get(name) is not None]
    return f"{info.get('size')} {known[0]}" if known else None


def _wave(name: str) -> int:
    """0, 1 or 2: when a file is uploaded, so that nothing looks whole before it is."""
    return 2 if name == FILE else int(name.rsplit("/", 1)[-1] in _CONFIGS)


def _bar(advance: Callable[[int], None]) -> Any:
    from fsspec.callbacks import Callback, NoOpCallback

    class Bytes(NoOpCallback):  # type: ignore[misc]
        """Counts the bytes of one file."""

        def relative_update(self, inc: int = 1) -> None:
            advance(inc)

    class Files(Callback):  # type: ignore[misc]
        def branched(self, _source: str, _target: str, **_options: object) -> Bytes:
            return Bytes()

    return Files()
