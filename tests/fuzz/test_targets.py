"""Files changed at random: only our errors come out. `make fuzz` looks longer, led by coverage."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from .mutate import mutated
from .targets import TARGETS, Target

HANGS, GROWTH = 60, 300_000


@contextmanager
def ends() -> Iterator[None]:
    """Turns a hang into a failure."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {HANGS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors(name: str, tmp_path: Path) -> None:
    target, work = TARGETS[name], tmp_path / "work"
    seeds = target.prepare(work)
    target.read(work, seeds[0])
    for seed in seeds[1:]:
        target(work, seed)
    chance = random.Random(name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(target.rounds):
        data = chance.choice(seeds)
        for _ in range(chance.randint(1, 4)):
            data = mutated(data, target.text, chance)
        try:
            with ends():
                target(work, data)
        except BaseException as error:
            raise AssertionError(f"round {number}: {data[:2000]!r}") from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < GROWTH


def test_other_errors_come_out(tmp_path: Path) -> None:
    def read(_folder: Path, data: bytes) -> object:
        return data[0]

    with pytest.raises(IndexError):
        Target("broken", lambda _: [b"a"], read)(tmp_path, b"")


def test_every_method_is_read(tmp_path: Path) -> None:
    target = TARGETS["runs of other methods"]
    seeds = target.prepare(tmp_path)
    assert len(seeds) == 12
    for seed in seeds:
        target.read(tmp_path, seed)
