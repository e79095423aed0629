"""vLLM under change: does a name always answer with its own run's present weights?

    python scripts/chaos_vllm.py [--answers 20000] [--minutes 600] [--delay 4] [--kills 3]

With the Python of vLLM's environment. `dora-serve up --live` serves a base and five runs; four more
come later by the resolver, and four by `dora-serve watch`; more than `--max-cpu-loras` holds. Eight
clients ask all names with short and long prompts, while runs are exchanged, overwritten, written
slowly, cut, deleted, brought back and made what cannot be served, and vLLM is killed. Every answer
is compared with what the contents say, live in PEFT or the method's own module, that its name had
at that moment or within `--delay` seconds before. Prints a table; exit code 1 where an answer was
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
from chaos_world import (
    BAD,
    BASE,
    GONE,
    TOKENS,
    Answer,
    Place,
    Truth,
    is_said,
    make_contents,
    next_change,
    prompts,
    truths,
)

CLIENTS = 8
STARTED = ["start-1", "start 2, α", "--max-loras", "Lora_Rank=8", "模型"]
LATER = ["later-1", "later-2", "later-3", "later=4,"]
WATCHED = ["watched-1", "watched-2", "watched-3", "-watched"]
VLLM = ["--max-model-len", "320", "--enforce-eager", "--kv-cache-memory-bytes", "100000000"]
VLLM += ["--max-loras", "3", "--max-cpu-loras", "5", "--max-lora-rank", "16"]
_PAUSE = (0.3, 2.5)  # seconds between two changes


@dataclass
class Asked:
    """A request: when, and what came of it: an answer, an HTTP status with its text, or nothing."""

    name: str
    prompt: int
    begin: float
    end: float
    answer: Answer | None = None
    status: int = 0
    text: str = ""


@dataclass
class Run:
    """One run of the program."""

    url: str
    answers: int
    places: list[Place]
    contents: dict[str, Path]
    random: Random
    asked: list[Asked] = field(default_factory=list)
    answered: int = 0  # requests that were answered or refused
    down: list[tuple[float, float]] = field(default_factory=list)  # vLLM, since it was killed
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, number: int) -> None:
        random = Random(number)
        names = [BASE, *(place.name for place in self.places)]
        all_prompts = prompts()
        while not self.stop.is_set():
            prompt = random.randrange(len(all_prompts))
            one = _ask(self.url, random.choice(names), prompt, all_prompts[prompt])
            self.asked.append(one)
            if one.answer is None and not one.status:
                time.sleep(1)
                continue
            self.answered += 1
            if self.answered >= self.answers:
                self.stop.set()

    def begin(self) -> None:
        """Let everything be there and served."""
        for place in self.places:
            if not place.events:
                self.change_one(place, "copy", self.random.choice(["r1", "r4", "patterns", "ada"]))
        for place in self.places:
            while _ask(self.url, place.name, 0, prompts()[0]).answer is None:
                time.sleep(0.5)

    def change(self) -> None:
        while not self.stop.wait(self.random.uniform(*_PAUSE)):
            place = self.random.choice(self.places)
            self.change_one(place, *next_change(place, self.contents, self.random))

    def change_one(self, place: Place, kind: str, content: str) -> None:
        place.change(kind, content, self.contents[content])

    def kill(self, up: int, times: int) -> None:
        for number in range(times):
            wanted = (number + 1) * self.answers // (times + 1)
            while self.answered < wanted and not self.stop.wait(0.2):
                pass
            begin = time.time()
            below = psutil.Process(up).children(recursive=True)
            random = self.random.choice(below)
            with suppress(psutil.Error):
                random.kill()  # the server, its engine, or a helper of theirs
            time.sleep(2)
            while not _ready(self.url) and not self.stop.wait(0.2):
                pass
            self.down.append((begin, time.time()))

    def judge(self, truth: dict[str, Truth], delay: float) -> tuple[Counter[str], list[str]]:
        """What came how often, and what should not have come."""
        counts: Counter[str] = Counter()
        wrong = []
        by_name = {place.name: place for place in self.places}
        for one in self.asked:
            down = any(one.end >= a - 1 and one.begin <= b + delay for a, b in self.down)
            possible = {BASE}
            if one.name != BASE:  # a change that a start met shows within the delay too
                since = [a for a, b in self.down if a <= one.begin <= b + delay]
                possible = by_name[one.name].possible(min([one.begin, *since]), one.end)
            if one.answer is not None:
                said = [n for n, t in truth.items() if is_said(one.answer, t, one.prompt)]
                verdict = "right" if possible & set(said) else "of another or of weights long gone"
                if not said:
                    verdict = "nobody's"
            elif 400 <= one.status < 500:
                allowed = possible & {GONE, BAD} or down
                verdict = "refused with a reason" if allowed else "refused without need"
            else:
                verdict = "vLLM was down" if down else "failed"
            counts[verdict] += 1
            if verdict in _WRONG:
                came = said if one.answer is not None else (one.status, one.text)
                what = f"{one.name!r} prompt {one.prompt} at {one.begin:.2f}"
                wrong.append(f"{verdict}: {what}: {came} of {possible}")
        return counts, wrong


_WRONG = ("of another or of weights long gone", "nobody's", "refused without need", "failed")


def _ask(url: str, name: str, number: int, prompt: list[int]) -> Asked:
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 5,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    request = Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    one = Asked(name, number, time.time(), 0)
    try:
        with urlopen(request, timeout=120) as answer:
            told = json.load(answer)["choices"][0]["logprobs"]
        one.answer = (
            [int(word.split(":")[1]) for word in told["tokens"]],
            [{int(k.split(":")[1]): v for k, v in at.items()} for at in told["top_logprobs"]],
        )
    except HTTPError as error:
        one.status, one.text = error.code, error.read().decode(errors="replace")[:300]
    except (OSError, ValueError) as error:
        one.text = repr(error)
    one.end = time.time()
    return one


def _ready(url: str) -> bool:
    with suppress(OSError), urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _free_port() -> int:
    """Below those that the system gives out, of which another process may have been given one in
    the minute until vLLM opens it."""
    for port in Random().sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no port is free")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=4.0)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600, help="It ends then, if not before.")
    parser.add_argument("--keep", type=Path, help="a folder for what is made, which stays")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp(prefix="chaos-vllm-"))
    try:
        return chaos(root, options)
    finally:
        if options.keep is None:
            shutil.rmtree(root)


def chaos(root: Path, options: argparse.Namespace) -> int:
    answers, delay = options.answers, options.delay
    root.mkdir(exist_ok=True)
    contents = make_contents(root)
    truth = truths(root / BASE, contents)
    random = Random(options.seed)
    live, watched = root / "live", root / "watched"
    (live / "later").mkdir(parents=True)
    for folder in (live, watched):
        shutil.copytree(root / BASE, folder / BASE)
    places = [Place(name, live / name, delay) for name in STARTED]
    places += [Place(name, live / "later" / name, delay) for name in LATER]
    places += [Place(name, watched / name, delay) for name in WATCHED]
    good = [name for name in contents if not name.startswith("bad-")]
    for place, content in zip(places[: len(STARTED)], good, strict=False):
        place.change("copy", content, contents[content])
    program = str(Path(sys.executable).parent / "dora-serve")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    up = [program, "up", str(live), "--engine", "vllm", "--live", "--port", str(port), "--", *VLLM]
    watch = [program, "watch", str(watched), "--server", url, "--interval", "0.5"]
    environment = {**os.environ, "DORA_SERVE_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    with (root / "log").open("w") as log:
        processes = [
            subprocess.Popen(words, stdout=log, stderr=log, env=environment)
            for words in (up, watch)
        ]
        try:
            while not _ready(url):
                if processes[0].poll() is not None:
                    raise SystemExit((root / "log").read_text()[-3000:])
                time.sleep(0.5)
            run = Run(url, answers, places, contents, random)
            run.begin()
            began = time.time()
            limit = threading.Timer(60 * options.minutes, run.stop.set)
            limit.daemon = True
            limit.start()
            with ThreadPoolExecutor(CLIENTS + 2) as pool:
                jobs = [pool.submit(run.client, number) for number in range(CLIENTS)]
                jobs += [
                    pool.submit(run.change),
                    pool.submit(run.kill, processes[0].pid, options.kills),
                ]
                for job in jobs:
                    job.result()
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(timeout=90)
    counts, wrong = run.judge(truth, delay)
    changes = sum(len(place.events) for place in places)
    print(f"{run.answered} answers in {time.time() - began:.0f} s, {changes} changes, ", end="")
    print(f"vLLM killed {len(run.down)} times; seed {options.seed}, delay {delay:g} s\n")
    print("| what came | how often |\n|---|---:|")
    for verdict in ("right", "refused with a reason", "vLLM was down", *_WRONG):
        print(f"| {verdict} | {counts[verdict]} |")
    for line in wrong[:40]:
        print(line, file=sys.stderr)
    return int(bool(wrong) or not counts["right"])


if __name__ == "__main__":
    sys.exit(main())
