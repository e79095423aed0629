"""Files of others, changed at random and led by coverage (atheris): do only our errors come out?

    python scripts/fuzz.py [--seconds 600]

The targets are those of tests/fuzz/targets.py, each in processes of its own, all together for so
many seconds. A failure is another exception than ours, the end of the process, an input that takes
a minute, or memory beyond 2 GB, of which torch takes a fifth. Prints a table; exit code 1 after any
failure, the inputs of which are kept.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS_PER_INPUT, MEGABYTES, LONGEST = 60, 2048, 1 << 16


@dataclass(frozen=True)
class Result:
    """Of one target; `failures`: what came out and the file with the input."""

    name: str
    executions: int
    megabytes: int
    failures: list[str]


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one target in this process, which then ends. What comes out is written to `folder`."""
    import atheris

    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["converters", "dora_serve"]):
        from converters.readers import readers
        from tests.fuzz.mutate import mutated
        from tests.fuzz.targets import TARGETS

        for late in ("converters.model.architecture", "converters.targets.gguf.adapter"):
            import_module(late)
        readers()
    target, found = TARGETS[name], set()
    for part in ("corpus", "failures"):
        (folder / part).mkdir(parents=True)
    for number, seed in enumerate(target.prepare(folder / "work")):
        (folder / "corpus" / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            target(folder / "work", data)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = type(error), last.filename, last.lineno
            if place not in found:
                found.add(place)
                kept = folder / "failures" / str(len(found))
                kept.write_bytes(data)
                kept.with_suffix(".txt").write_text(traceback.format_exc())

    def change(data: bytes, size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return bytes(atheris.Mutate(data, size))
        return mutated(data, target.text, chance)[:size]

    options = {
        "max_total_time": seconds,
        "max_len": LONGEST,
        "timeout": SECONDS_PER_INPUT,
        "rss_limit_mb": MEGABYTES,
        "artifact_prefix": f"{folder / 'failures'}/",
        "print_final_stats": 1,
        "detect_leaks": 0,
        "seed": 1,
    }
    flags = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([name, str(folder / "corpus"), *flags], one, custom_mutator=change)
    atheris.Fuzz()


def watch(name: str, seconds: int, below: Path) -> Result:
    """Fuzz one target in another process."""
    folder = below / re.sub(r"\W+", "-", name)
    folder.mkdir()
    log = folder / "log"
    command = [sys.executable, __file__, "--target", name, str(seconds), str(folder / "in")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("wb") as stream:
        done = subprocess.run(command, stdout=stream, stderr=stream, env=environment)
    said = log.read_text(errors="replace")
    executions, megabytes = (
        int(match[1]) if (match := re.search(rf"stat::{stat}:\s*(\d+)", said)) else 0
        for stat in ("number_of_executed_units", "peak_rss_mb")
    )
    failures = [
        f"{path.with_suffix('')}\n{path.read_text()}"
        for path in sorted((folder / "in/failures").glob("*.txt"))
    ]
    if done.returncode:
        failures.append(f"{folder / 'in/failures'}: exit code {done.returncode}\n{said[-3000:]}")
    return Result(name, executions, megabytes, failures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--target", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        name, seconds, folder = options.target
        fuzz(name, int(seconds), Path(folder))
    sys.path.insert(0, str(ROOT))
    from tests.fuzz.targets import TARGETS

    below = Path(tempfile.mkdtemp(prefix="dora-fuzz."))
    workers = os.cpu_count() or 1
    seconds = max(1, options.seconds * min(workers, len(TARGETS)) // len(TARGETS))
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(partial(watch, seconds=seconds, below=below), TARGETS))
    print("| target | executions | failures | peak memory |\n|---|---:|---:|---:|")
    for result in results:
        numbers = f"{result.executions:,} | {len(result.failures)} | {result.megabytes} MB"
        print(f"| {result.name} | {numbers} |")
    executions = sum(result.executions for result in results)
    failures = [failure for result in results for failure in result.failures]
    print(f"\n{executions:,} inputs, {seconds} s a target: {len(failures)} failures")
    if failures:
        print("\n".join(failures), f"\nthe inputs are kept in {below}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(below)


if __name__ == "__main__":
    main()
