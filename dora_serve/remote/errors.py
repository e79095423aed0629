"""The errors of file systems at URLs as ours, without the secrets that a URL may hold."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from converters.errors import DoraExportError, MissingError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RemoteError(DoraExportError, OSError):
    """What is at a URL cannot be read or written."""


def shown(text: str) -> str:
    """A URL, or text with URLs, without passwords and signatures."""
    # A password may hold "/" and "@"; what stands before "@" without ":" may be a hub's repository.
    hidden = re.sub(r"://([^/\s]*|[^/:\s]*:\S*)@", "://…@", text)
    return re.sub(r"\?[^\s'\">)]*", "?…", hidden)


@contextmanager
def errors(name: str, protocol: str, done: str) -> Iterator[None]:
    """Each protocol has exceptions of its own; from here on they are ours, about the URL `name`,
    which cannot be `done`."""
    try:
        yield
    except DoraExportError:
        raise
    except ImportError as error:
        extra = "'dora-serve[remote]'" if protocol in ("s3", "s3a") else "the package named above"
        raise MissingError(
            f"a package for {protocol}:// is not installed",
            file=name,
            found=str(error),
            remedy=f"pip install {extra}",
        ) from None
    except FileNotFoundError as error:
        raise MissingError("nothing at this URL", file=name, found=said(error)) from None
    except PermissionError as error:
        raise RemoteError(
            "access denied",
            file=name,
            found=said(error),
            remedy=f"look after the credentials that fsspec finds for {protocol}://",
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        raise RemoteError(
            f"cannot be {done}", file=name, found=f"{type(error).__name__}: {said(error)}"
        ) from None


def said(error: Exception) -> str:
    return shown(str(error).partition("\n")[0])[:300]
