"""How a merge grows with the model: time and memory from 0.1 to 3 billion parameters.

    python scripts/bench_scaling.py [--layers 2 10 22 44 65] [--runs 3] [--folder /dev/shm]

The random Llamas of `bench_merge.py` with ever more layers, after one of half the width with four
layers; medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from bench_merge import Measure, make_inputs, measure, variants

COPY, OURS = "cp -r", "dora-export merge"


def median(measures: list[Measure], field: str) -> float:
    return float(statistics.median(getattr(each, field) for each in measures))


def bench(folder: Path, layers: int, hidden: int, runs: int) -> None:
    base, adapter, size = make_inputs(folder, layers, hidden)
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True
    ).stdout.strip()
    out = folder / "out"
    measures: dict[str, list[Measure]] = {COPY: [], OURS: []}
    for _ in range(runs):
        for name, found in measures.items():
            command = variants(base, adapter, out)[name]
            flush = None if kind == "tmpfs" else out
            found.append(measure(command, (base, folder / "warm"), flush))
            shutil.rmtree(out)
    work, copy = median(measures[OURS], "work"), median(measures[COPY], "work")
    print(
        f"| {size / 2e9:.2f} | {size / 1e9:.2f} | {copy:.2f} | {work:.2f} | {work / copy:.2f} "
        f"| {size / 1e9 / work:.2f} | {median(measures[OURS], 'anonymous'):.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 22, 44, 65])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    print("| 10⁹ parameters | GB | cp -r s | merge s | × cp | GB/s | anonymous MB |")
    print(f"|{'---:|' * 7}")
    for layers, hidden in [(4, 1024), *((layers, 2048) for layers in options.layers)]:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench(Path(folder), layers, hidden, options.runs)


if __name__ == "__main__":
    main()
