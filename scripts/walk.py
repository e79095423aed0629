"""Through how many of our files a run passes in a command, and how often its tensors are read.

    python scripts/walk.py RUN --base BASE

A file counts where a function of it is entered while the command works; imports do not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("converters", "dora_serve")


def walk(words: list[str]) -> tuple[set[str], Counter[str], int]:
    """The files entered, the reads per tensor of the run, and the exit code of one command."""
    from dora_serve.commands import dora_export

    files: set[str] = set()
    reads: Counter[str] = Counter()

    def enter(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name == "<module>":
            return
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            files.add(str(path.relative_to(ROOT)))
            if code.co_qualname == "SafetensorsTensor.load":
                reads[frame.f_locals["self"].name] += 1

    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        result = CliRunner().invoke(dora_export, words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return files, reads, result.exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--base", required=True)
    given = parser.parse_args()
    base = ["--base", given.base]
    print("| command | files | reads of a factor |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, words in {
            "merge": ["merge", given.run, f"{folder}/merged", *base],
            "adapter": ["adapter", given.run, f"{folder}/adapter", *base],
            "onnx": ["onnx", given.run, f"{folder}/onnx", *base],
            "inspect": ["inspect", given.run, *base],
            "verify": ["verify", given.run, f"{folder}/merged", *base],
        }.items():
            files, reads, code = walk(words)
            factors = [count for tensor, count in reads.items() if "lora_" in tensor]
            print(f"| {name} | {len(files)} | {max(factors, default=0)} |")
            if code:
                print(f"{name} failed", file=sys.stderr)


if __name__ == "__main__":
    main()
