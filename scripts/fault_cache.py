"""Rounds for the cache, and for what `up` prepares: for `faults.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fault_rounds import Command, Rounds, Row, as_made, into_cache, outputs, prepare
from fault_world import Process, empty, fill, identity, mounted
from safetensors.torch import load_file, save_file


def damaged_cache(rounds: Rounds, command: Command, times: int) -> None:
    """What lies in the cache is damaged, or exchanged, before it is asked for again."""
    for number in range(times):
        with rounds.round("cached artifact damaged", command, old=True) as processes:
            (artifact,) = outputs(rounds.world.place)
            files = [path for path in sorted(artifact.rglob("*")) if path.is_file()]
            file = rounds.random.choice(files)
            way = number % 5
            if way == 0:
                data = bytearray(file.read_bytes())
                data[rounds.random.randrange(len(data))] ^= 1 << rounds.random.randrange(8)
                file.write_bytes(data)
            elif way == 1:
                file.unlink()
            elif way == 2:
                os.truncate(file, rounds.random.randrange(file.stat().st_size))
            elif way == 3:
                shutil.rmtree(artifact)
                artifact.symlink_to(rounds.world.inputs / "old")
            else:
                (artifact / "more").write_text("of somebody else")
            for run in ("old", "new"):
                processes.append(rounds.start(command, run))
                processes[-1].wait()
        for aside in (rounds.world.place / "cache").glob("aside-*"):
            shutil.rmtree(aside)


def changing_run(rounds: Rounds, command: Command, times: int) -> None:
    """A run's weights are truncated, rewritten, replaced or removed while they are converted."""
    copy = rounds.world.folder / "copy"
    shutil.copytree(rounds.world.inputs, copy)
    weights, other = copy / "new" / "adapter_model.safetensors", rounds.world.folder / "other"
    original = rounds.world.inputs / "new" / weights.name
    save_file({name: -each for name, each in load_file(original).items()}, other, {"format": "pt"})
    disturbed = replace(command, work=partial(into_cache, copy))

    def restore() -> None:
        shutil.copyfile(original, copy / "fresh")
        (copy / "fresh").replace(weights)

    def exchange() -> None:
        shutil.copyfile(other, copy / "fresh")
        (copy / "fresh").replace(weights)

    ways: dict[str, Callable[[], object]] = {
        "truncated": lambda: os.truncate(weights, 5000),
        "rewritten": lambda: weights.write_bytes(other.read_bytes()),
        "replaced": exchange,
        "removed": lambda: weights.unlink(),
    }
    empty(rounds.world.place)
    exchange()
    rounds.run(disturbed, "new")
    changed = identity(outputs(rounds.world.place)[0])
    assert changed is not None
    restore()
    for number in range(times):
        for way, disturb in ways.items():
            with rounds.round(
                f"run {way} while it is converted",
                disturbed,
                old=number % 2 == 0,
                allowed=(changed,),
                after=restore,
            ) as processes:
                processes.append(rounds.start(disturbed))
                time.sleep(rounds.random.uniform(0, command.seconds[0]))
                disturb()
    shutil.rmtree(copy)


def preparing(rounds: Rounds, times: int) -> None:
    """`up` prepares a folder of a base and two runs, and is disturbed."""
    world = rounds.world
    root, disk = world.folder / "served", world.folder / "disk"
    shutil.copytree(world.inputs, root)
    run = root / "new" / "adapter_model.safetensors"
    kept, filler = run.read_bytes(), disk / "filler"

    def rewrite() -> None:
        run.write_bytes((root / "old" / run.name).read_bytes()[:-1])

    begin = time.monotonic()
    empty(world.place)
    first = world.start(partial(prepare, root, world.place))
    if first.wait(600):
        raise SystemExit(f"up prepares nothing: {first.said}")
    seconds = time.monotonic() - begin
    full = mounted(disk)
    ways: dict[str, Callable[[Process], object]] = {
        "kill -9": Process.kill,
        "a run half written": lambda _: rewrite(),
        "a run removed": lambda _: run.unlink(),
        **({"disk full (tmpfs)": lambda _: fill(filler)} if full else {}),
    }
    for number in range(times * len(ways)):
        fault = list(ways)[number % len(ways)]
        place = disk if "disk" in fault else world.place
        row = rounds.rows.setdefault((f"{fault} while up prepares", "up"), Row())
        empty(place)
        process = world.start(partial(prepare, root, place))
        time.sleep(rounds.random.uniform(0, seconds))
        ways[fault](process)
        code = process.wait(600)
        run.write_bytes(kept)
        filler.unlink(missing_ok=True)
        problems = []
        if "Traceback" in process.said or (code > 0 and "error: " not in process.said):
            problems.append(f"no clear error, exit code {code}: {process.said[-1500:]}")
        if not as_made(place):
            problems.append("the cache takes something for made that is not")
        again = world.start(partial(prepare, root, place))
        if again.wait(600) or not as_made(place):
            problems.append(f"the next start fails: {again.said[-1500:]}")
        if left := world.litter(place):
            problems.append(f"litter: {left}")
        row.tried += 1
        row.done += code == 0
        row.stopped += code != 0
        row.lost += [f"{fault} while up prepares: {problem}" for problem in problems]
    if full:
        subprocess.run(["umount", str(disk)], check=True)
