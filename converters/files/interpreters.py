"""Interpreters of Python that are started below this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# `python -m` and `-c` look for modules in the current folder first, which may be one of models
# that others made: a `json.py` there would be run.
INSTALLED_ALONE = {"PYTHONSAFEPATH": "1"}


def environment(**more: str) -> dict[str, str]:
    """Of an interpreter that imports what is installed, and nothing from the current folder;
    `more` where this process's own has nothing else."""
    return {**more, **os.environ, **INSTALLED_ALONE}


def current_folder() -> str | None:
    """Where to start one: where this process is, or at the root where that folder is gone, as
    after an upgrade: torch's own libraries end a process there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return "/"
    return None


@contextmanager
def installed_alone() -> Iterator[None]:
    """The same of those that are started meanwhile by who takes no environment."""
    before = {name: os.environ.get(name) for name in INSTALLED_ALONE}
    os.environ.update(INSTALLED_ALONE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
