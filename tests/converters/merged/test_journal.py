"""Merges that were stopped and go on, and of what they take nothing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.files.leftovers import JOURNAL
from converters.run import Run
from converters.updates.magnitude import MagnitudeUpdate
from converters.updates.update import Update
from dora_serve import merge
from tests.conftest import Dense
from tests.converters.made import (
    low_rank,
    make_base,
    make_run,
)


class Stop(SystemExit):
    """Ends a merge as a signal would."""


def interrupted(run: Run, base: Path, target: Path, after: int, **more: Any) -> Path:
    """The folder of a merge that was stopped when `after` bytes were written."""
    lock, written = threading.Lock(), 0

    @contextmanager
    def progress(_total: int) -> Iterator[Any]:
        def advance(count: int) -> None:
            nonlocal written
            with lock:
                written += count
                if written > after:
                    raise Stop(1)

        yield advance

    with pytest.raises(Stop):
        merge(run, target, base=base, resume=True, progress=progress, **more)
    (folder,) = (path for path in target.parent.iterdir() if path.name.startswith(".out."))
    return folder


def twelve(tmp_path: Path) -> tuple[Path, dict[str, Update]]:
    shards = [{f"model.layers.{n}.q_proj.weight": torch.randn(4, 6)} for n in range(12)]
    updates: dict[str, Update] = {
        f"model.layers.{n}.q_proj": low_rank(4, 6, seed=n) for n in range(12)
    }
    return make_base(tmp_path / "base", *shards), updates


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a shard was written anew."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (each.st_ino, each.st_mtime_ns) for name, each in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_merge_goes_on(tmp_path: Path) -> None:
    base, updates = twelve(tmp_path)
    run = make_run(tmp_path / "run", updates)
    merge(run, tmp_path / "whole", base=base)
    folder = interrupted(run, base, tmp_path / "out", after=6 * 96)
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    done = [line["shard"] for line in lines[1:]]
    assert 1 <= len(done) <= 6
    (folder / "stray").mkdir()
    (folder / "stray2").write_text("x")
    before = states(folder)
    told: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Any]:
        yield told.append
        assert sum(told) == total

    result = merge(run, tmp_path / "out", base=base, resume=True, progress=progress)
    after = states(tmp_path / "out")
    assert {name for name in before if before[name] == after[name]} >= set(done)
    assert told[0] == 96 * len(done)
    assert sorted(result.report.summary()["resumed"]) == sorted(done)
    assert result.report.lines()[0] == f"{len(done)} shard(s) are of a killed merge"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all("nor the run holds" in said for said in result.warnings)


@pytest.mark.parametrize("damage", ["byte", "size", "gone", "link", "report", "line", "no object"])
def test_what_the_journal_cannot_confirm_is_made_anew(tmp_path: Path, damage: str) -> None:
    base, updates = twelve(tmp_path)
    run = make_run(tmp_path / "run", updates)
    merge(run, tmp_path / "whole", base=base)
    folder = interrupted(run, base, tmp_path / "out", after=6 * 96)
    lines = (folder / JOURNAL).read_text().splitlines()
    entry = json.loads(lines[1])
    shard = folder / entry["shard"]
    raw = shard.read_bytes()
    if damage == "byte":
        shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "size":
        shard.write_bytes(raw + b"x")
    elif damage == "gone":
        shard.unlink()
    elif damage == "link":
        shard.rename(tmp_path / "moved")
        shard.symlink_to(tmp_path / "moved")
    elif damage == "report":
        lines[1] = json.dumps({**entry, "rounding": {"x": {"nonsense": 1}}})
    elif damage == "line":
        lines[1] = lines[1][:-5]
    else:
        lines[1] = "[]"
    (folder / JOURNAL).write_text("\n".join(lines) + "\n")
    before = states(folder)
    result = merge(run, tmp_path / "out", base=base, resume=True)
    after = states(tmp_path / "out")
    kept = {name for name in before if before[name] == after[name]}
    others = {json.loads(line)["shard"] for line in lines[2:]}
    if damage in ("line", "no object"):
        assert not kept & others
    else:
        assert kept & others == others
    told = any(entry["shard"] in warning for warning in result.warnings)
    assert told is (damage not in ("line", "no object"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["low rank", "dense", "magnitude"])
@pytest.mark.parametrize("what", ["update", "base", "dtype", "method", "file"])
def test_of_another_merge_nothing_is_taken(tmp_path: Path, kind: str, what: str) -> None:
    base, updates = twelve(tmp_path)
    last = "model.layers.11.q_proj"
    file = tmp_path / "run" / "file"
    file.parent.mkdir()
    file.write_text("1")

    def last_update(size: float) -> Update:
        delta = low_rank(4, 6, seed=5, size=size)
        if kind == "low rank":
            return delta
        if kind == "magnitude":
            return MagnitudeUpdate(torch.full((4,), size), low_rank(4, 6))
        return Dense(delta.dense())

    run = make_run(tmp_path / "run", {**updates, last: last_update(1.0)}, files=(file,))
    folder = interrupted(run, base, tmp_path / "out", after=6 * 96)
    before = states(folder)
    more: dict[str, Any] = {}
    if what == "update":
        run = make_run(run.path, {**updates, last: last_update(2.0)}, files=(file,))
    elif what == "base":
        path = max(base.glob("*.safetensors"))
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif what == "dtype":
        more["dtype"] = torch.bfloat16
    elif what == "method":
        run = Run(run.path, "other", run.updates, files=(file,))
    else:
        file.write_text("2")
    result = merge(run, tmp_path / "out", base=base, resume=True, **more)
    assert not before.items() & states(tmp_path / "out").items()
    assert any("another run" in warning for warning in result.warnings)
    merge(run, tmp_path / "whole", base=base, **more)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
