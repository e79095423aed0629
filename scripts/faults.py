"""Commands that write, stopped and disturbed in every way: is anything lost?

    python scripts/faults.py [--short] [--seed 0] [--onnx] [--only merge]

After every round the old output must be there whole or the new one, the inputs as they were, the
message one error without traceback; then the command runs undisturbed, and no temporary file may be
left. Prints a table; exit code 1 when anything was lost. Needs root for the rows with a small disk
and with other rights, and a C compiler for the rows in which system calls fail.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from fault_cache import changing_run, damaged_cache, preparing
from fault_rounds import Command, Rounds, Row, commands, outputs, table
from fault_world import (
    FINDS,
    NAMES,
    NOBODY,
    READS,
    WRITES,
    Arm,
    Process,
    World,
    empty,
    fill,
    identity,
    make_inputs,
    mounted,
)

SHIM = "DORA_FAULT_SHIM"


def kills(rounds: Rounds, command: Command, times: int) -> None:
    """SIGKILL at random moments."""
    for number in range(times):
        with rounds.round("kill -9, random moment", command, old=number % 2 == 0) as processes:
            process = rounds.start(command)
            processes.append(process)
            time.sleep(rounds.random.uniform(0, 1.1 * command.seconds[0]))
            process.kill()


def at_calls(
    rounds: Rounds, command: Command, fault: str, kinds: int, code: int, times: int, below: Path
) -> None:
    """The error `code`, or SIGKILL for 0, at `times` system calls spread over all of a command; one
    is in its middle."""
    total = calls(rounds, command, kinds, below)
    if not total:
        raise SystemExit(f"{fault}: {command.name} makes no such calls")
    places = [i / (times - 1) for i in range(times)] if times > 1 else [0.5]
    for nth in sorted({1 + int(place * (total - 1)) for place in places}):
        with rounds.round(fault, command, old=nth % 2 == 0) as processes:
            processes.append(rounds.start(command, arm=Arm(kinds, nth, code, below)))


def calls(rounds: Rounds, command: Command, kinds: int, below: Path) -> int:
    """How many calls of these kinds the command makes undisturbed."""
    count = rounds.world.folder / f"count-{kinds}"
    if not count.exists():
        empty(rounds.world.place)
        shutil.copytree(command.kept, rounds.world.place, dirs_exist_ok=True)
        rounds.start(command, arm=Arm(kinds, 0, 0, below, count)).wait()
    return int(count.read_text())


def two_at_once(rounds: Rounds, command: Command, times: int) -> None:
    for number in range(times):
        with rounds.round("two on one output at once", command, old=number % 2 == 0) as processes:
            processes.append(rounds.start(command, "new"))
            time.sleep(rounds.random.uniform(0, 0.3 * command.seconds[0]))
            processes.append(rounds.start(command, "new" if command.name == "cache" else "old"))
            processes[0].wait()
            processes[1].wait()


def changing_base(rounds: Rounds, command: Command, times: int) -> None:
    """A shard of the base is truncated, rewritten, replaced or removed while it is read."""
    original = command.base
    copy = rounds.world.folder / "copy"
    other = rounds.world.folder / "other"
    for folder in (copy, other):
        shutil.copytree(original, folder)
    shard = sorted(original.glob("*.safetensors"))[-1].name
    size = (other / shard).stat().st_size
    with (other / shard).open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size // 4))
    disturbed = replace(command, base=copy)
    of_other = replace(command, base=other)
    rounds.run(of_other, "new")
    changed = identity(outputs(rounds.world.place)[0])
    assert changed is not None

    def rewrite() -> None:
        (copy / shard).write_bytes((other / shard).read_bytes())

    def exchange() -> None:
        shutil.copyfile(other / shard, copy / "fresh")
        (copy / "fresh").replace(copy / shard)

    def restore() -> None:
        shutil.copyfile(original / shard, copy / "fresh")
        (copy / "fresh").replace(copy / shard)

    ways: dict[str, Callable[[], object]] = {
        "truncated": lambda: os.truncate(copy / shard, size // 2),
        "rewritten": rewrite,
        "replaced": exchange,
        "removed": lambda: (copy / shard).unlink(),
    }
    for number in range(times):
        for way, disturb in ways.items():
            with rounds.round(
                f"base shard {way} while it is read",
                disturbed,
                old=number % 2 == 0,
                allowed=(changed,),
                after=restore,
            ) as processes:
                process = rounds.start(disturbed)
                processes.append(process)
                _wait_for_writing(rounds.world.place, process)
                time.sleep(rounds.random.uniform(0, 0.5 * command.seconds[0]))
                disturb()
    for folder in (copy, other):
        shutil.rmtree(folder)


def _wait_for_writing(place: Path, process: Process) -> None:
    end = time.monotonic() + 60
    while not any(place.rglob("*.dora-tmp")) and time.monotonic() < end:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


def full_disk(rounds: Rounds, command: Command, times: int) -> None:
    """The output's disk fills up while the command writes; also, one too small from the start."""
    place = rounds.world.folder / "disk"
    if not mounted(place):
        rounds.skip("disk full (tmpfs)", "skipped: needs root")
        return
    work = partial(command.work, place, "new", command.base)
    filler = place / "filler"
    try:
        for number in range(times):
            early = number % 3 == 0
            with rounds.round(
                "disk full (tmpfs)",
                command,
                old=number % 2 == 0,
                place=place,
                after=partial(filler.unlink, missing_ok=True),
            ) as processes:
                if early:
                    fill(filler)
                processes.append(rounds.world.start(work))
                if not early:
                    _wait_for_writing(place, processes[0])
                    fill(filler)
        with rounds.round(
            "disk read-only (tmpfs)",
            command,
            old=True,
            place=place,
            after=lambda: subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True),
        ) as processes:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            processes.append(rounds.world.start(work))
            processes[0].wait()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def no_rights(rounds: Rounds, command: Command) -> None:
    if os.geteuid():
        rounds.skip("no rights to write", "skipped: needs root")
        return
    place = rounds.world.place
    with rounds.round("no rights to write", command, old=True) as processes:
        processes.append(rounds.start(command, user=NOBODY))
        processes[0].wait()
    assert place.stat().st_uid == 0


def clock(rounds: Rounds, command: Command) -> None:
    """Inputs, the old output and what a killed command left are dated far ahead, or long ago."""
    for when in (4102444800, 1):  # 2100 and 1970
        with rounds.round("clock far ahead or behind", command, old=True) as processes:
            if command.name != "cache":
                (rounds.world.place / ".out.abcdefgh.dora-tmp").mkdir()
            for path in (*rounds.world.inputs.rglob("*"), *rounds.world.place.rglob("*")):
                os.utime(path, (when, when))
            processes.append(rounds.start(command))
            processes[0].wait()


def run_all(world: World, name: str, short: bool, seed: int) -> dict[tuple[str, str], Row]:
    """All rounds of one command; "up": of what it prepares."""
    rounds = Rounds(world, seed)
    if name == "up":
        preparing(rounds, 2)
        return rounds.rows
    command = commands(world)[name]
    rounds.learn(command)
    kills(rounds, command, 1 if short else 5 if name == "onnx" else 25)
    two_at_once(rounds, command, 1 if short else 1 if name == "onnx" else 10)
    if name == "onnx":
        full_disk(rounds, command, 3)
        return rounds.rows
    place, inputs = world.place, world.inputs
    faults = (
        ("kill -9, at a system call", WRITES | NAMES, 0, place),
        ("ENOSPC, at a system call", WRITES | NAMES, errno.ENOSPC, place),
        ("EIO while writing", WRITES, errno.EIO, place),
        ("EIO while reading", READS, errno.EIO, inputs),
        ("no permission, from an input on", FINDS, errno.EACCES, inputs),
        ("gone, from an input on", FINDS, errno.ENOENT, inputs),
    )
    few = short and name != "merge"  # the way that all are written and read is one
    for fault, kinds, code, below in faults[: 2 if few else None]:
        if world.shim:
            times = 1 if short else 30 if code == 0 else 12
            at_calls(rounds, command, fault, kinds, code, times, below)
        else:
            rounds.skip(fault, "skipped: no C compiler")
    if name == "cache":
        damaged_cache(rounds, command, 5 if short else 20)
        changing_run(rounds, command, 1 if short else 6)
    if name == "merge":
        changing_base(rounds, command, 1 if short else 6)
    if name == "merge" or not short:
        full_disk(rounds, command, 1 if short else 6)
        no_rights(rounds, command)
        clock(rounds, command)
    return rounds.rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="one round of each")
    parser.add_argument("--onnx", action="store_true", help="dora-export onnx too: slow")
    parser.add_argument("--only", help="one of merge, adapter, cache, onnx, up")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    library = os.environ.get(SHIM)
    if library is None:
        _preload()
    elif library:
        del os.environ["LD_PRELOAD"]  # loaded; not into what the commands start
        shutil.rmtree(Path(library).parent)
    names = ["merge", "adapter", "cache", *(["onnx", "up"] if options.onnx else [])]
    names = [options.only] if options.only else names
    with tempfile.TemporaryDirectory(prefix="dora-faults.") as top:
        Path(top).chmod(0o755)
        begin = time.monotonic()
        make_inputs(Path(top) / "inputs")
        rows: dict[tuple[str, str], Row] = {}
        # Each command in a world of its own, all of them at once.
        with ProcessPoolExecutor(len(names), get_context("fork")) as pool:
            worlds = [
                World(Path(top) / name, Path(top) / "inputs", bool(library)) for name in names
            ]
            short, seeds = repeat(options.short), repeat(options.seed)
            for found in pool.map(run_all, worlds, names, short, seeds):
                rows |= found
        seconds = time.monotonic() - begin
    lost = [problem for row in rows.values() for problem in row.lost]
    tried = sum(row.tried for row in rows.values())
    print(table(rows))
    print(f"\n{tried} rounds in {seconds:.0f} s, seed {options.seed}: {len(lost)} lost")
    print("\n".join(lost), file=sys.stderr)
    sys.exit(1 if lost else 0)


def _preload() -> None:
    """Begin this program anew with the library that makes calls fail, where it can be compiled."""
    compiler = shutil.which("cc")
    source = Path(__file__).with_name("fault_shim.c")
    # One thread: on a busy machine those of a small product wait for each other.
    environment = {**os.environ, SHIM: "", "OMP_NUM_THREADS": "1"}
    if compiler:
        library = Path(tempfile.mkdtemp(prefix="dora-shim.")) / "shim.so"
        library.parent.chmod(0o755)
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
        environment |= {SHIM: str(library), "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":
    main()
