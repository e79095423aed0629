"""The commands that are disturbed, and rounds that judge what is left: for `faults.py`."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fault_world import MODELS, RUNS, Arm, Process, World, empty, export, identity

from converters.certificate import FILE

ONNX_RUNS = {"old": RUNS / "Count_Down/Tiny_Llama--Count_Down--1",
             "new": RUNS / "Every_Second/Tiny_Llama--Every_Second--1"}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """`work(place, run, base)` makes the artifact of the run in a folder; `seconds` it takes, and
    the identities of what it makes of both runs are measured once. `kept`: a copy of what the old
    run becomes."""

    name: str
    work: Callable[[Path, str, Path], None]
    base: Path
    kept: Path
    made: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Row:
    tried: int = 0
    stopped: int = 0
    done: int = 0
    lost: list[str] = field(default_factory=list)


def outputs(place: Path) -> list[Path]:
    """The artifacts in a place: the folder `out`, or what lies in the cache."""
    own = (place / "out", *(place / "cache").glob("[!.]*"))
    beside = ("locks", "hashes", "receipts", "aside")  # the last: what was of somebody else
    return [path for path in own if path.is_dir() and path.name.partition("-")[0] not in beside]


def commands(world: World) -> dict[str, Command]:
    inputs = world.inputs

    def merge(place: Path, run: str, base: Path) -> None:
        export("merge", inputs / run, place / "out", "--base", base, "--force")

    def adapter(place: Path, run: str, base: Path) -> None:
        export("adapter", inputs / run, place / "out", "--base", base, "--force")

    def graph(place: Path, run: str, base: Path) -> None:
        export("onnx", ONNX_RUNS[run], place / "out", "--base", base, "--force")

    base, tiny = inputs / "base", MODELS / "tiny-llama-base"
    kept = world.folder / "kept"
    made = (
        Command("merge", merge, base, kept),
        Command("adapter", adapter, base, kept),
        Command("cache", partial(into_cache, inputs), base, kept),
        Command("onnx", graph, tiny, kept),
    )
    return {command.name: command for command in made}


def into_cache(inputs: Path, place: Path, run: str, base: Path) -> None:
    """Convert a run of `inputs`, by its name, for vLLM into the cache of `place`, as `up` does."""
    from converters.errors import DoraExportError
    from converters.model.base import open_base
    from dora_serve.folder.inventory import read_member
    from dora_serve.vllm.convert import vllm_adapter

    os.environ["DORA_SERVE_CACHE"] = str(place / "cache")
    try:
        vllm_adapter(read_member(run, inputs / run, [], open_base(base)))
    except DoraExportError as error:
        sys.exit(print(f"error: {error}") or 1)


def prepare(root: Path, place: Path) -> None:
    """Make what `up` serves of `root`; a member that cannot be served is an error here."""
    from converters.errors import DoraExportError
    from dora_serve.server.prepare.make import make_offer

    os.environ["DORA_SERVE_CACHE"] = str(place / "cache")
    try:
        problems = make_offer(root, None, False, print).problems
    except DoraExportError as error:
        problems = {"all": str(error)}
    if problems:
        sys.exit(print(f"error: {problems}") or 1)


def as_made(place: Path) -> bool:
    """Whether all that the cache of `place` calls made is there as it was made."""
    from dora_serve.folder.cache import _content

    receipts = [*(place / "cache/receipts").glob("*.json")]
    known = {path.stem: json.loads(path.read_text()) for path in receipts}
    cache = place / "cache"
    return all(content in (None, _content(cache / name)) for name, content in known.items())


class Rounds:
    """The rounds of all faults with their rows."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.rows: dict[tuple[str, str], Row] = {}

    def run(self, command: Command, run: str, place: Path | None = None) -> Process:
        place = place or self.world.place
        process = self.world.start(partial(command.work, place, run, command.base))
        process.wait()
        return process

    def learn(self, command: Command) -> None:
        """What the command makes of both runs, and how long it takes."""
        for run in ("old", "new"):
            empty(self.world.place)
            begin = time.monotonic()
            process = self.run(command, run)
            command.seconds[:] = [time.monotonic() - begin]
            (made,) = outputs(self.world.place) or [self.world.place]
            name = identity(made)
            if process.code or name is None:
                raise SystemExit(f"{command.name} fails undisturbed: {process.said}")
            command.made[run] = name
            if run == "old":
                shutil.copytree(self.world.place, command.kept)
        if command.made["old"] == command.made["new"]:
            raise SystemExit("both runs make the same artifact: nothing can be told from it")

    @contextmanager
    def round(
        self,
        fault: str,
        command: Command,
        *,
        old: bool,
        place: Path | None = None,
        allowed: tuple[str, ...] = (),
        after: Callable[[], object] = lambda: None,
    ) -> Iterator[list[Process]]:
        """One round: within, the caller starts and disturbs processes and lists them. `old`: there
        is an artifact already; `allowed`: what else may come out; `after` ends the disturbance."""
        row = self.rows.setdefault((fault, command.name), Row())
        place = place or self.world.place
        empty(place)
        if old:
            shutil.copytree(command.kept, place, dirs_exist_ok=True)
        processes: list[Process] = []
        yield processes
        codes = [process.wait() for process in processes]
        after()
        problems = []
        for process, code in zip(processes, codes, strict=True):
            if "Traceback" in process.said or (code > 0 and "error: " not in process.said):
                problems.append(f"no clear error, exit code {code}: {process.said[-1500:]}")
        found = [identity(path) for path in outputs(place)]
        if old and not found:
            problems.append("the old output is gone")
        if not {*found} <= {*command.made.values(), *allowed}:
            problems.append(f"an output that is neither old nor new; codes {codes}")
        new = any(name != command.made["old"] for name in found)
        if codes == [0] and not new:
            problems.append("exit code 0 without the new output")
        if self.world.inputs_changed():
            problems.append("the inputs changed")
        again = self.run(command, "new", place)
        if again.code:
            problems.append(f"the next command fails: {again.said[-1500:]}")
        elif command.made["new"] not in map(identity, outputs(place)):
            known = [(path / FILE).read_text() for path in outputs(place)]
            problems.append(f"the next command makes something else: {known}")
        if left := self.world.litter(place):
            problems.append(f"litter: {left}")
        row.tried += 1
        row.done += new
        row.stopped += not new
        row.lost += [f"{fault}, {command.name}: {problem}" for problem in problems]

    def start(
        self, command: Command, run: str = "new", arm: Arm | None = None, **more: int
    ) -> Process:
        work = partial(command.work, self.world.place, run, command.base)
        return self.world.start(work, arm, **more)

    def skip(self, fault: str, why: str) -> None:
        self.rows[fault, why] = Row()


def table(rows: Mapping[tuple[str, str], Row]) -> str:
    lines = [
        "| fault | command | tried | old whole, or none | new whole | lost |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (fault, name), row in rows.items():
        numbers = [row.tried, row.stopped, row.done, len(row.lost)]
        lines.append(f"| {fault} | {name} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)
