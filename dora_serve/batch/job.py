"""One run to convert, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["done", "failed", "pending"]


@dataclass(frozen=True)
class Job:
    """The run `run` becomes the folder `output`: `to` is adapter, for `target`, or merged.

    `run` and `base` are folders or hub ids. `done` is the hash of what `output` was made from,
    None when it is to be made in any case. `ours`: a batch made what `output` holds, if anything.
    """

    name: str
    run: str
    base: str | None
    to: str
    target: str
    output: Path
    done: str | None = None
    ours: bool = False


@dataclass(frozen=True)
class Record:
    """The state of one run. `input` is the hash of what went in, see `content_key`; `worker` is
    the host and process that had it."""

    state: State
    output: str
    input: str | None = None
    seconds: float | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    worker: str | None = None


PULSE = 1.0  # seconds
# Each job as it ends, with its record or None where its output was there; None alone at least every
# PULSE in which none ended.
Results = Generator[tuple[Job, Record | None] | None, None, None]
Engine = Callable[[Sequence[Job]], Results]
