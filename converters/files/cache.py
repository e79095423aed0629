"""The user's cache folder. What lies in it is believed, so it is the user's alone."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError

_OWN = {"hashes", "locks", "receipts"}
ELSEWHERE = "set DORA_SERVE_CACHE to a folder of your own"


def cache_folder() -> Path:
    """`$DORA_SERVE_CACHE`, else `dora-serve` in the user's cache folder. It may not be there.

    Raises `OutputError` where the user has none, as a number without a name in a container.
    """
    own = os.environ.get("DORA_SERVE_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora-serve"
    except RuntimeError:
        raise OutputError(
            "the cache has no place: HOME is not set, and the system knows no home of this user",
            found=f"user {os.geteuid()}",
            remedy=ELSEWHERE,
        ) from None


def private_cache() -> Path:
    """`cache_folder()`, made where it is not there, and closed to everybody else.

    Raises `OutputError` where it cannot be made, is a link, belongs to somebody else, or holds
    other things that others may use.
    """
    folder = cache_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = os.fstat(descriptor)
            if found.st_uid == os.geteuid() and found.st_mode & 0o077:
                inside = os.listdir(descriptor)
                if inside and not _OWN & {*inside}:
                    raise OutputError(
                        "the cache is open to others and holds what is not of a cache",
                        file=folder,
                        found=", ".join(sorted(inside)[:5]),
                        remedy=ELSEWHERE,
                    )
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    except OutputError:
        raise
    except OSError as error:
        if folder.is_symlink():
            raise OutputError(
                "the cache is a link, which is not followed",
                file=folder,
                found=folder.readlink(),
                remedy=ELSEWHERE,
            ) from None
        raise OutputError(
            f"the cache cannot be written: {error.strerror}", file=folder, remedy=ELSEWHERE
        ) from None
    if found.st_uid != os.geteuid():
        raise OutputError(
            "the cache belongs to another user, who could put anything into it",
            file=folder,
            found=f"user {found.st_uid}",
            expected=f"user {os.geteuid()}",
            remedy=ELSEWHERE,
        )
    return folder
