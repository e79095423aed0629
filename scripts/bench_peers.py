"""Ours against llama.cpp's server at equal bytes: one model, greedy, by HTTP, on one machine.

    python scripts/bench_peers.py BASE GGUF --llama BUILD [--rounds 3] [--folder DIR]

BASE: a model's folder; GGUF: the same in float32, as llama.cpp's convert_hf_to_gguf.py writes it;
BUILD: llama.cpp's folder with `bin/llama-server` and `bin/llama-quantize`. Both have the same
prompts as token ids. One server runs at a time and they take turns; the medians of all rounds are
told. A conversation's first turn has 1,000 tokens, its second all of these, the answer and 16 more.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from bench_server import PORT, URL, serving

MODEL = "model"
PROMPT, NEW, HISTORY = 64, 48, 1000
LONG = 512  # tokens of every fourth prompt where long and short ones come together
EQUALS = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_K_M"}


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 30000), k=count)


async def complete(http: httpx.AsyncClient, ids: Sequence[int], count: int) -> list[float]:
    """Seconds to the first piece of the answer, and from piece to piece."""
    body: dict[str, Any] = {"prompt": list(ids), "max_tokens": count, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "model": MODEL}
    times = [time.perf_counter()]
    async with http.stream("POST", f"{URL}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


async def measure(clients: Sequence[int], seed: int) -> dict[str, float]:
    """What one server took, by the rows of the table."""
    found: dict[str, float] = {}
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=99)) as http:
        await complete(http, tokens(seed, 9), 4)
        for count in clients:
            prompts = [tokens(1000 * seed + 10 * count + i, PROMPT) for i in range(count)]
            begin = time.perf_counter()
            done = await asyncio.gather(*(complete(http, ids, NEW) for ids in prompts))
            seconds = time.perf_counter() - begin
            if count == 1:
                found["prompt, tokens/s"] = PROMPT / done[0][0]
                seconds -= done[0][0]
            found[f"{count} clients, tokens/s"] = (count * NEW - (count == 1)) / seconds
            if count > 1:
                found[f"{count} clients, p95 of a token, ms"] = await _mixed(http, count, seed)
        history = tokens(1000 * seed + 999, HISTORY)
        found["first turn, ms"] = 1e3 * (await complete(http, history, 1))[0]
        history += tokens(seed, 16)
        found["second turn, ms"] = 1e3 * (await complete(http, history, 1))[0]
    return found


async def _mixed(http: httpx.AsyncClient, clients: int, seed: int) -> float:
    """Two requests of each client, every fourth of them long."""
    gaps: list[float] = []

    async def client(number: int) -> None:
        for turn in range(2):
            length = PROMPT if (number + turn) % 4 else LONG
            ids = tokens(10**6 + 1000 * seed + 100 * number + turn, length)
            gaps.extend((await complete(http, ids, NEW))[1:])

    await asyncio.gather(*(client(number) for number in range(clients)))
    return 1e3 * statistics.quantiles(gaps, n=20)[-1]


def peers(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Name → the command of a server."""
    threads, port = str(options.threads), ["--port", str(PORT)]
    served = folder / "served"
    if not served.exists():
        shutil.copytree(options.base, served / MODEL)
    ours = [str(Path(sys.executable).parent / "dora-serve"), "up", str(served), *port]
    found = {}
    for precision, kind in EQUALS.items():
        if precision not in options.precisions:
            continue
        file = folder / f"{kind}.gguf"
        if not file.exists():
            quantize = [str(options.llama / "bin/llama-quantize"), str(options.gguf), str(file)]
            subprocess.run([*quantize, kind, threads], check=True, stdout=subprocess.DEVNULL)
        command = [str(options.llama / "bin/llama-server"), "-m", str(file), "-t", threads, *port]
        command += ["-np", str(max(options.clients)), "-c", str(2048 * max(options.clients))]
        found[kind] = command
        found[precision] = [*ours, "--threads", threads, "--precision", precision]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precisions", nargs="+", default=list(EQUALS), choices=list(EQUALS))
    parser.add_argument("--folder", type=Path, help="where files are made, and kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        environment = {"DORA_SERVE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        medians: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for turn in range(options.rounds):
            for name, command in peers(options, folder).items():
                with serving(command, folder, environment):
                    found = asyncio.run(measure(options.clients, turn))
                print(json.dumps({"round": turn, "server": name, **found}), file=sys.stderr)
                for row, value in found.items():
                    medians[name][row].append(value)
    print("| | precision | ours | llama.cpp | × |\n|---|---|---:|---:|---:|")
    for row in next(iter(medians.values())):
        for precision in options.precisions:
            kind = EQUALS[precision]
            ours, theirs = (statistics.median(medians[n][row]) for n in (precision, kind))
            ratio = theirs / ours if row.endswith("ms") else ours / theirs
            print(f"| {row} | {precision}, {kind} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
