"""A server's memory over many requests: 5,000 of every kind, some broken off by the client.

    python scripts/soak_server.py [--requests 5000] [--folder models]

Prints the memory after every tenth of them, and fails when it grew by more than 16 MB over the last
seven tenths.
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


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "dora-serve"), "up", str(folder)]
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
    words = choose.choices(["count", "cat", "moon", "nine"], k=choose.randint(1, 40))
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("models"))
    options = parser.parse_args()
    process = start(options.folder)
    found = []
    try:
        with httpx.Client(base_url=URL, timeout=120) as http, ThreadPoolExecutor(8) as pool:
            models = http.get("/dora/models").json()["data"]
            part = options.requests // 10
            for tenth in range(10):
                numbers = range(tenth * part, (tenth + 1) * part)
                list(pool.map(lambda number: ask(http, models, number), numbers))
                found.append(memory(process))
                print(f"{(tenth + 1) * part} requests: {found[-1] / 1e6:.1f} MB", flush=True)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    if found[-1] - found[2] > GROWTH:
        raise SystemExit(f"it grew by {(found[-1] - found[2]) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
