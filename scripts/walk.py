"""Through how many of our files a run passes in a command, and how often its tensors are read.

    python scripts/walk.py RUN --base BASE

A file counts where a function of it is entered while the command works; imports do not.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import threading
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("converters", "dora_serve")


@cache
def _own(name: str) -> str | None:
    """Of a file of ours its path in the repository."""
    path = Path(name)
    own = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
    return str(path.relative_to(ROOT)) if own else None


def walk(words: list[str]) -> tuple[set[str], dict[str, float], int]:
    """The files entered, how often each tensor was read, and the exit code of one command."""
    from dora_serve.commands import dora_export

    files: set[str] = set()
    reads: defaultdict[str, float] = defaultdict(float)

    def enter(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name == "<module>":
            return
        own = _own(code.co_filename)
        if own is not None:
            files.add(own)
            if code.co_qualname == "SafetensorsTensor.read_into":
                tensor, buffer = frame.f_locals["self"], frame.f_locals["buffer"]
                reads[tensor.name] += buffer.numel() / max(1, math.prod(tensor.shape))

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
            print(f"| {name} | {len(files)} | {max(factors, default=0):g} |")
            if code:
                print(f"{name} failed", file=sys.stderr)


if __name__ == "__main__":
    main()
