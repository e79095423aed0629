"""Ours against llama.cpp's server at equal bytes: one model, greedy, by HTTP, on one machine.

    python scripts/bench_peers.py BASE GGUF --llama BUILD --folder DIR [--minutes 18] [--write FILE]

BASE: a Llama's folder; GGUF: the same in float32, as llama.cpp's convert_hf_to_gguf.py writes it;
BUILD: llama.cpp's folder with `bin/llama-server`, `bin/llama-quantize` and `bin/llama-perplexity`.
Both serve eight adapters of ranks 1 to 16 beside the model, and get the same prompts as token ids.
One server runs at a time and they take turns, in rounds, until the time is used up; the medians are
told. DIR keeps what is made, so that another call begins at once. FILE: the table takes the place
of what stands there between `<!-- peers NAME -->` and `<!-- /peers -->`; NAME is that of BASE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bench_precision import CHUNK, TEXTS, feeds, session
from bench_server import ADAPTERS, PORT, URL, make_adapters, serving
from tokenizers import Tokenizer

PROMPT, NEW, HISTORY = 64, 48, 1000
LONG = 512  # tokens of every fourth prompt where long and short ones come together
EQUALS = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_K_M"}
CHUNKS = 8  # of text, on which qualities are compared
MODES: dict[str, list[int | None]] = {
    "one model": [None],
    "one adapter": [0],
    "eight adapters": [*range(len(ADAPTERS))],
}
SMALLER = re.compile(r", (ms|MB)$|divergence")  # rows in which less is better


def new(clients: int) -> int:
    """Tokens of an answer: fewer where many ask, so that there is time for more rounds."""
    return NEW if clients <= 8 else NEW // 3


class Client:
    """Asks one server, which names adapters its own way."""

    def __init__(self, http: httpx.AsyncClient, ours: bool, seed: int) -> None:
        self._http, self._ours = http, ours
        self._random = random.Random(seed)

    def prompt(self, count: int) -> list[int]:
        """Tokens that no server has seen."""
        return self._random.choices(range(1000, 30000), k=count)

    async def ask(self, prompt: Sequence[int], count: int, adapter: int | None = None) -> Any:
        """Seconds to each piece of the answer that has a text, and to its end."""
        body: dict[str, Any] = {"prompt": list(prompt), "max_tokens": count, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "model": "model"}
        if not self._ours:  # without a word on one of them, llama.cpp applies all
            scale = float(adapter is not None)
            body["lora"] = [{"id": adapter or 0, "scale": scale}]
        elif adapter is not None:
            body["model"] = ADAPTERS[adapter]
        times, begin = [], time.perf_counter()
        async with self._http.stream("POST", f"{URL}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise SystemExit((await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices")
                    if choices and choices[0]["text"]:
                        times.append(time.perf_counter() - begin)
        return [*times, time.perf_counter() - begin]

    async def together(self, count: int, adapters: Sequence[int | None]) -> tuple[float, Any]:
        """So many at once: the seconds, and the pieces' times of each."""
        prompts = [self.prompt(PROMPT) for _ in range(count)]
        begin = time.perf_counter()
        asked = [
            self.ask(prompt, new(count), adapters[i % len(adapters)])
            for i, prompt in enumerate(prompts)
        ]
        done = await asyncio.gather(*asked)
        return time.perf_counter() - begin, done

    async def mixed(self, clients: int) -> float:
        """The 95th percentile of the seconds between pieces, where every fourth prompt is long."""
        gaps: list[float] = []

        async def client(number: int) -> None:
            for turn in range(16 // clients or 1):
                length = PROMPT if (number + turn) % 4 else LONG
                gaps.extend(np.diff(await self.ask(self.prompt(length), new(clients))))

        await asyncio.gather(*(client(number) for number in range(clients)))
        return statistics.quantiles(gaps, n=20)[-1]


async def measure(ours: bool, clients: Sequence[int], seed: int) -> dict[str, float]:
    """What one server took, by the rows of the table."""
    found: dict[str, float] = {}
    # llama.cpp closes connections that were kept, and a request on one may meet that.
    limits = httpx.Limits(max_connections=99, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        client = Client(http, ours, seed)
        for adapter in (None, *range(len(ADAPTERS))):  # what is loaded at the first request
            await client.ask(client.prompt(9), 2, adapter)
        for mode, adapters in MODES.items():
            for count in clients:
                if count == 1 and len(adapters) > 1:
                    continue
                seconds, done = await client.together(count, adapters)
                if count == 1:  # without the prompt
                    seconds -= done[0][0]
                    if mode == "one model":
                        found["first token of 64, ms"] = 1e3 * done[0][0]
                name = f"{mode}, {count} client{'s' * (count > 1)}, tokens/s"
                found[name] = (count * new(count) - (count == 1)) / seconds
        for count in clients:
            if count > 1:
                name = f"{count} clients, every fourth prompt long, p95 of a token, ms"
                found[name] = 1e3 * await client.mixed(count)
        found[f"prompt of {LONG}, tokens/s"] = LONG / (await client.ask(client.prompt(LONG), 1))[-1]
        history = client.prompt(HISTORY)
        found["first turn of 1,000, ms"] = 1e3 * (await client.ask(history, 1))[-1]
        history += client.prompt(16)
        found["second turn, ms"] = 1e3 * (await client.ask(history, 1))[-1]
    return found


def peak(process: int) -> float:
    """MB of memory that a process had at most."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def make_files(options: argparse.Namespace) -> None:
    """Adapters for both sides, the GGUF files, and graphs, as far as they are not there."""
    from dora_serve import write_adapter, write_onnx

    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "served" / "model"
    if not base.exists():
        shutil.copytree(options.base, base)
    if not (folder / "served" / ADAPTERS[-1]).exists():
        make_adapters(base, folder / "served")
    for name in ADAPTERS:
        if not (out := folder / "gguf" / name).exists():
            write_adapter(folder / "served" / name, out, base=options.base, target="gguf")
    for precision in options.precisions:
        kind = EQUALS[precision]
        if not (file := folder / f"{kind}.gguf").exists():
            run_tool(options, "llama-quantize", str(options.gguf), str(file), kind)
        if not (out := folder / "onnx" / precision).exists():
            write_onnx(options.base, out, adapters={}, precision=precision)


def run_tool(options: argparse.Namespace, name: str, *arguments: str) -> str:
    command = [str(options.llama / "bin" / name), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout.decode(errors="replace")


def commands(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Name and command of each server."""
    folder, threads, most = options.folder, str(options.threads), max(options.clients)
    ours = [str(Path(sys.executable).parent / "dora-serve"), "up", str(folder / "served")]
    theirs = [str(options.llama / "bin/llama-server"), "--lora-init-without-apply", "--lora"]
    theirs += [",".join(str(folder / "gguf" / name / f"{name}.gguf") for name in ADAPTERS)]
    theirs += ["-t", threads, "-np", str(most), "-c", str(1152 * most), "--port", str(PORT)]
    for precision in options.precisions:
        yield EQUALS[precision], [*theirs, "-m", str(folder / f"{EQUALS[precision]}.gguf")]
        small = ["--threads", threads, "--precision", precision, "--port", str(PORT)]
        yield precision, [*ours, *small]


def qualities(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Server → mean KL divergence and same top token against float32 on text, both sides on the
    second halves of the same chunks, as `llama-perplexity` has it; kept in files."""
    text = options.folder / "text.txt"
    if not text.exists():
        text.write_text("".join(path.read_text(encoding="utf-8") for path in TEXTS))
    found: dict[str, dict[str, float]] = {}
    for side, find in (("llama.cpp", _their_qualities), ("ours", _our_qualities)):
        file = options.folder / f"quality-{side}.json"
        if not file.exists():
            file.write_text(json.dumps(find(options, text)))
        found |= json.loads(file.read_text())
    for precision, kind in EQUALS.items():
        for name, path in (
            (precision, options.folder / "onnx" / precision / "model.onnx.data"),
            (kind, options.folder / f"{kind}.gguf"),
        ):
            if path.exists():
                found.setdefault(name, {})["weights, MB"] = path.stat().st_size / 1e6
    return found


def _their_qualities(options: argparse.Namespace, text: Path) -> dict[str, dict[str, float]]:
    logits = options.folder / "logits"
    common = ["-c", str(CHUNK), "-t", str(options.threads), "--kl-divergence-base", str(logits)]
    said = ["-m", str(options.folder / "F32.gguf"), "-f", str(text), "--chunks", str(CHUNKS)]
    told = run_tool(options, "llama-perplexity", *said, *common)
    found = {"F32": {"perplexity": _number(r"PPL = ([\d.]+)", told)}}
    for kind in list(EQUALS.values())[1:]:
        model = str(options.folder / f"{kind}.gguf")
        told = run_tool(options, "llama-perplexity", "-m", model, "--kl-divergence", *common)
        found[kind] = {
            "mean KL divergence": _number(r"Mean +KLD: +([\d.]+)", told),
            "same top token, %": _number(r"Same top p: +([\d.]+)", told),
        }
    logits.unlink()
    return found


def _number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"llama.cpp told no {pattern}:\n{text[-3000:]}")
    return float(match[1])


def _our_qualities(options: argparse.Namespace, text: Path) -> dict[str, dict[str, float]]:
    ids = Tokenizer.from_file(str(options.base / "tokenizer.json")).encode(text.read_text()).ids
    graphs = {p: session(options.folder / "onnx" / p, options.threads) for p in EQUALS}
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for begin in range(0, CHUNK * CHUNKS, CHUNK):
        chunk = np.array(ids[begin : begin + CHUNK])
        every = {name: _second_half(graph, chunk) for name, graph in graphs.items()}
        exact = every.pop("fp32")
        said = exact[np.arange(len(exact)), chunk[-len(exact) :]]
        sums["fp32"].append((-said.mean(), 0.0))
        for name, found in every.items():
            divergence = (np.exp(exact) * (exact - found)).sum(-1).mean()
            sums[name].append((divergence, (exact.argmax(-1) == found.argmax(-1)).mean()))
    means = {name: np.mean(pairs, axis=0) for name, pairs in sums.items()}
    result = {"fp32": {"perplexity": math.exp(means.pop("fp32")[0])}}
    for name, (divergence, same) in means.items():
        result[name] = {"mean KL divergence": divergence, "same top token, %": 100 * same}
    return result


def _second_half(graph: Any, chunk: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Log-probabilities `[tokens, words]` of the tokens of the second half but its first."""
    logits = graph.run(["logits"], feeds(graph, chunk[None]))[0][0, CHUNK // 2 : -1]
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: np.ndarray[Any, Any] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def table(options: argparse.Namespace, found: dict[str, dict[str, float]], rounds: int) -> str:
    cores = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    used = [f"{p} | {EQUALS[p]} | ×" for p in options.precisions]
    lines = [
        f"{os.cpu_count()} cores of {cores[1] if cores else 'an unknown kind'}, "
        f"{options.threads} threads, {options.base.name}; medians of {rounds} rounds. Every × is "
        "llama.cpp's time, memory or error over ours, or our rate over llama.cpp's: above 1 we "
        "lead.\n",
        f"| | {' | '.join(used)} |",
        f"|---|{'---:|' * 3 * len(used)}",
    ]
    for row in dict.fromkeys(row for each in found.values() for row in each):
        cells = []
        for precision in options.precisions:
            ours, theirs = (found[name].get(row) for name in (precision, EQUALS[precision]))
            if not ours or not theirs:
                cells += ["", "", ""]
                continue
            ratio = theirs / ours if SMALLER.search(row) else ours / theirs
            numbers = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (ours, theirs)]
            cells += [*numbers, f"{ratio:.2f}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where files are made and kept")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--minutes", type=float, default=18, help="0: only make the files")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precisions", nargs="+", default=list(EQUALS), choices=list(EQUALS))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    begin = time.perf_counter()
    make_files(options)
    told = qualities(options)
    environment = {"DORA_SERVE_CACHE": str(options.folder / "cache"), "HF_HUB_OFFLINE": "1"}
    for name, command in commands(options):
        with serving(command, options.folder, environment):  # converts what it serves
            print(f"{name} starts", file=sys.stderr)
    medians: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    longest, rounds = 0.0, 0
    while time.perf_counter() - begin + longest < 60 * options.minutes:
        since = time.perf_counter()
        turns = list(commands(options))
        for name, command in turns if rounds % 2 else reversed(turns):
            with serving(command, options.folder, environment) as process:
                ours = name in EQUALS
                found = asyncio.run(measure(ours, options.clients, rounds))
                found["peak memory, MB"] = peak(process)
            print(json.dumps({"round": rounds, "server": name, **found}), file=sys.stderr)
            for row, value in found.items():
                medians[name][row].append(value)
        longest, rounds = max(longest, time.perf_counter() - since), rounds + 1
    if not rounds:
        return
    for name, rows in medians.items():
        told[name] = {**{row: statistics.median(all_) for row, all_ in rows.items()}, **told[name]}
    text = table(options, told, rounds)
    print(text)
    if options.write:
        page = options.write.read_text()
        mark, end = f"<!-- peers {options.base.name} -->\n", "<!-- /peers -->"
        before, rest = page.split(mark)
        options.write.write_text(f"{before}{mark}{text}\n{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    main()
