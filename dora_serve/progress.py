"""What a person sees who waits: bars and times left on a terminal, nothing anywhere else."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from converters.errors import OutputError
from converters.files.cache import private_cache
from converters.progress import Progress

LOUDNESS = "dora_serve.loudness"
_AFTER = 2.0  # seconds; what takes less needs no bar
# What long work takes where it was never done before: seconds to load torch, and for each gigabyte.
_START, _PACE = 4.0, 8.0


def is_said(loudness: str) -> bool:
    """Whether the command was called with `--quiet` or `--verbose`, as `loudness` says."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(LOUDNESS) == loudness


def _is_watched() -> bool:
    return sys.stderr.isatty() and not is_said("quiet")


@contextmanager
def progress_bar(total: int, text: str, unit: str = "B") -> Iterator[Progress]:
    """A bar with bytes (or runs, …) and time left, once it takes long."""
    if not _is_watched():
        yield lambda _count: None
        return
    from tqdm import tqdm

    scaled = unit == "B"
    with tqdm(
        total=total, desc=text, unit=unit, unit_scale=scaled, leave=False, delay=_AFTER
    ) as bar:

        def update(count: int) -> None:
            bar.update(count)

        yield update


@contextmanager
def timed(kind: str, text: str, nbytes: int) -> Iterator[None]:
    """A line with the time that this takes and about how long is left, for work that cannot tell
    how far it is: as long as the last of its `kind` took here for each of its bytes."""
    begun = time.monotonic()
    gigabytes = nbytes / 1e9
    expected = _START + _pace(kind) * gigabytes
    done = threading.Event()

    def tell() -> None:
        from tqdm import tqdm

        with tqdm(bar_format="{desc}", leave=False) as line:
            while not done.wait(0.5):
                taken = time.monotonic() - begun
                left = expected - taken
                told = f", about {left:.0f} s left" if left >= 1 else ""  # longer than the last
                line.set_description_str(f"{text}: {taken:.0f} s{told}")

    watcher = threading.Thread(target=tell, daemon=True)
    if _is_watched():
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watcher.ident is not None:
            watcher.join()
    if gigabytes > 0.01:
        _keep_pace(kind, max(0.0, time.monotonic() - begun - _START) / gigabytes)


def say(text: str) -> None:
    """A line on stderr, above a bar that is there."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _pace(kind: str) -> float:
    """Seconds for each gigabyte, as they were the last time."""
    with suppress(OutputError, OSError, ValueError):
        return float(json.loads((private_cache() / "pace" / kind).read_text()))
    return _PACE


def _keep_pace(kind: str, seconds: float) -> None:
    with suppress(OutputError, OSError):
        place = private_cache() / "pace"
        place.mkdir(exist_ok=True)
        (place / kind).write_text(json.dumps(round(seconds, 3)))
