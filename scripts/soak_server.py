"""A server's memory over many requests: 5,000 of every kind, some broken off by the client.

    python scripts/soak_server.py [--requests 5000] [--folder models]

Many begin alike, little of what was computed can be kept, and one name stands for another run after
every twentieth of them. Prints the memory after every tenth, and fails when it grew by more than
16 MB over the last seven, or when a fresh server that keeps nothing answers otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

PORT = 8766
URL = f"http://127.0.0.1:{PORT}"
GROWTH = 16 << 20
CHANGES = "changes"  # the name that stands for one run after the other
WORDS = ["count", "cat", "moon", "nine"]
BEGINNINGS = [random.Random(i).choices(WORDS, k=20) for i in range(30)]


def start(folder: Path, prefixes: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "dora-serve"), "up", str(folder)]
    command += ["--prefix-cache", prefixes]
    process = subprocess.Popen(
        [*command, "--port", str(PORT)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            if httpx.get(f"{URL}/ready").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit("the server ended")


def memory(process: subprocess.Popen[bytes]) -> int:
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def ask(http: httpx.Client, models: list[dict[str, Any]], number: int) -> None:
    choose = random.Random(number)
    model = choose.choice(models)
    if model["task"] != "causal-lm":
        text = " ".join(choose.choices(["good", "bad", "film"], k=choose.randint(1, 20)))
        assert http.post("/classify", json={"model": model["id"], "input": text}).is_success
        return
    words = choose.choices(WORDS, k=choose.randint(1, 20))
    if choose.random() < 0.5:
        words = choose.choice(BEGINNINGS) + words
    body = {
        "model": model["id"],
        "prompt": " ".join(words),
        "max_tokens": choose.randint(1, 20),
        "temperature": choose.choice([0, 1]),
        "logprobs": choose.choice([None, 3]),
        "n": choose.choice([1, 1, 3]),
        "stream": choose.random() < 0.5,
    }
    if choose.random() < 0.1:
        leave(body)
        return
    if choose.random() < 0.05:
        assert http.post("/v1/completions", json={**body, "max_tokens": 10**6}).status_code == 400
        return
    answer = http.post("/v1/completions", json=body)
    assert answer.is_success, answer.text


def leave(body: dict[str, Any]) -> None:
    """Send a request and go."""
    request = httpx.Request("POST", f"{URL}/v1/completions", json=body)
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode()
    with socket.create_connection(("127.0.0.1", PORT)) as connection:
        connection.sendall(head + request.read())


def change(http: httpx.Client, folder: Path, turn: int) -> None:
    """Let the name stand for the next of the folder's runs of decoders."""
    runs = sorted(folder.glob("runs/Checkpoint/Tiny_Llama/*/*"))
    run = next(runs[turn % len(runs)].glob("*"))
    body = {"lora_name": CHANGES, "lora_path": str(run.resolve()), "load_inplace": True}
    assert http.post("/v1/load_lora_adapter", json=body).is_success


def answers(http: httpx.Client, models: list[dict[str, Any]]) -> list[str]:
    """What every model that writes answers to prompts that begin as others did."""
    prompts = [" ".join([*words, word]) for words in BEGINNINGS for word in WORDS]
    names = [model["id"] for model in models if model["task"] == "causal-lm"]
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "prompt": prompts}
    told = [http.post("/v1/completions", json={**body, "model": name}) for name in names]
    return [choice["text"] for answer in told for choice in answer.json()["choices"]]


def hits(http: httpx.Client) -> list[str]:
    lines = http.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("vllm:prefix_cache")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("models"))
    options = parser.parse_args()
    found: list[int] = []
    process = start(options.folder, "1MB")
    try:
        with httpx.Client(base_url=URL, timeout=120) as http, ThreadPoolExecutor(8) as pool:
            change(http, options.folder, 0)
            models = http.get("/dora/models").json()["data"]
            part = options.requests // 20
            for turn in range(20):
                numbers = range(turn * part, (turn + 1) * part)
                asked = [pool.submit(ask, http, models, number) for number in numbers]
                change(http, options.folder, turn + 1)
                for each in asked:
                    each.result()
                if turn % 2:
                    found.append(memory(process))
                    print(f"{(turn + 1) * part} requests: {found[-1] / 1e6:.1f} MB", flush=True)
            soaked = answers(http, models)
            print(*hits(http), sep="\n")
    finally:
        stop(process)
    process = start(options.folder, "0")
    try:
        with httpx.Client(base_url=URL, timeout=120) as http:
            change(http, options.folder, 20)
            fresh = answers(http, models)
    finally:
        stop(process)
    if found[-1] - found[2] > GROWTH:
        raise SystemExit(f"it grew by {(found[-1] - found[2]) / 1e6:.1f} MB")
    differ = sum(a != b for a, b in zip(soaked, fresh, strict=True))
    if differ:
        raise SystemExit(f"{differ} of {len(fresh)} answers differ from a fresh server's")
    print(f"{len(fresh)} answers are those of a fresh server")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(60)


if __name__ == "__main__":
    main()
