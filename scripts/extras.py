"""The wheel of a release in bare environments, with each extra alone: what works, what is refused.

    python scripts/extras.py DIST [EXTRA …]

What a command lacks it must say before it works, as `pip install 'dora-serve[EXTRA]'`. Versions are
those of constraints.txt. `ray` and `vllm` have environments of their own in the Makefile. Prints
what was run in each, and ends with 1 where anything was otherwise.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = [sys.executable, "-m", "uv"]
NAMES = {
    "RUN": "models/runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1",
    "BASE": "models/tiny-llama-base",
}
MAKE = [
    "dora-export merge $RUN merged --base $BASE",
    "dora-export adapter $RUN adapter --base $BASE --target vllm",
]
# Of each extra what works with it alone; the first with none at all.
WORKS = {
    "": [
        *MAKE,
        "dora-export inspect $RUN --base $BASE",
        "dora-export verify $RUN merged --base $BASE",
        "dora-export check merged --base $BASE",
        "dora-export lint adapter --base $BASE --target vllm",
        "dora-export diff $RUN adapter --base $BASE",
        "dora-export export $RUN lorax --base $BASE --target lorax",
        "dora-export extract merged extracted --base $BASE",
        "dora-export batch $RUNS batch --base $BASE",
        "dora-serve plan $RUNS --base $BASE",
        "dora-serve up $RUNS --base $BASE --engine vllm --dry-run",
        "dora-serve deploy models --to kubernetes --image IMAGE --output deployed",
        "dora-serve env",
    ],
    "peft": ["dora-export verify $RUN adapter --base $BASE"],
    "gguf": ["dora-export adapter $RUN adapter.gguf --base $BASE --target gguf"],
    "plot": [
        "dora-export inspect $RUN --base $BASE --png ranks.png",
        "dora-serve plan $RUNS --base $BASE --png plan.png",
    ],
    "sign": [
        "dora-export sign merged --private-key key.pem",
        "dora-export check merged --public-key public.pem",
    ],
    "remote": ["dora-export merge file://$PWD/$RUN file://$PWD/far --base $BASE --lora-alpha 16"],
    "onnx": [
        "dora-export onnx $RUN onnx --base $BASE",
        "dora-export verify $RUN onnx --base $BASE",
    ],
    "serve": ["dora-serve up models"],
}
BRINGS = {"serve": ("onnx", "serve")}
# Without the extra what stands in WORKS names it, but for what needs an artifact of the extra, and
# for addresses of files.
REFUSED = {
    **WORKS,
    "onnx": WORKS["onnx"][:1],
    "remote": ["dora-export inspect s3://bucket/run --base $BASE"],
}


def environment(extra: str, wheel: Path, folder: Path) -> dict[str, str]:
    """An environment with nothing but the wheel and one extra, as variables for its commands."""
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, folder / "env"], check=True)
    named = f"{wheel}[{extra}]" if extra else str(wheel)
    versions = ["--constraint", f"{ROOT}/constraints.txt", "--python", f"{folder}/env/bin/python"]
    subprocess.run([*UV, "pip", "install", "--quiet", *versions, named], check=True)
    (folder / "models").symlink_to(ROOT / "models")
    for words in (
        "ecparam -name prime256v1 -genkey -noout -out key.pem",
        "ec -in key.pem -pubout -out public.pem",
    ):
        subprocess.run(["openssl", *words.split()], check=True, cwd=folder, capture_output=True)
    runs = Path(NAMES["RUN"]).parents[1]
    path = f"{folder / 'env/bin'}:{os.environ['PATH']}"
    return {**os.environ, **NAMES, "RUNS": str(runs), "PATH": path, "HF_HUB_OFFLINE": "1"}


def answered(folder: Path, variables: dict[str, str]) -> str:
    """What is wrong with a server of everything in models, asked by HTTP; "" if nothing is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["dora-serve", "up", "models", "--port", str(port)]
    with subprocess.Popen(
        words, cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as up:
        assert up.stderr is not None
        try:
            for _ in range(600):
                time.sleep(0.5)
                if up.poll() is not None:
                    return up.stderr.read().decode()
                if status(port, "GET", "/ready")[0] == 200:
                    break
            name = json.loads(status(port, "GET", "/v1/models")[1])["data"][0]["id"]
            body = {"model": name, "prompt": "count : nine", "max_tokens": 8}
            code, text = status(port, "POST", "/v1/completions", body)
            return "" if code == 200 else text
        finally:
            up.terminate()


def status(port: int, method: str, path: str, body: object = None) -> tuple[int, str]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"Content-Type": "application/json"}
        client.request(method, path, json.dumps(body) if body else None, headers)
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    except ConnectionError:
        return 0, ""
    finally:
        client.close()


def wrong(line: str, lacking: str | None, folder: Path, variables: dict[str, str]) -> str:
    """What a command did otherwise than work, or name the extra it lacks; "" if nothing."""
    if line == WORKS["serve"][0] and lacking is None:
        return answered(folder, variables)
    before = set(folder.iterdir())
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=variables, capture_output=True, text=True
    )
    if lacking is None:
        return "" if done.returncode == 0 else f"{done.returncode}: {done.stderr[-2000:]}"
    named = re.search(r"pip install 'dora-serve\[(\w+)\]'", " ".join(done.stderr.split()))
    if done.returncode != 1 or named is None or named[1] != lacking:
        return f"{done.returncode}, does not name {lacking}: {done.stderr[-2000:]}"
    return f"left {left}" if (left := set(folder.iterdir()) - before) else ""


def main() -> None:
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    failed = 0
    for extra in sys.argv[2:] or WORKS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            variables = environment(extra, wheel, folder)
            works = list(MAKE if extra else WORKS[""])
            for other in BRINGS.get(extra, {extra} - {""}):
                works += WORKS[other]
            lacks = [(line, other) for other in WORKS if other for line in REFUSED[other]]
            lines = [*((line, None) for line in works), *(() if extra else lacks)]
            for line, lacking in lines:
                said = wrong(line, lacking, folder, variables)
                failed += bool(said)
                expected = "works" if lacking is None else f"names {lacking}"
                print(f"{extra or 'no extra'}: {line}: {said or expected}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
