"""The main job on a sample run: inspect, merge, repack, verify, ask base and merged model; then a
server of everything in models/, asked by HTTP.

python scripts/demo.py [OUT]
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
BASE = Path("models/tiny-llama-base")
RUN = Path("models/runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1")
SENTENCE = "the film was very good ."
PROMPTS = ("count : nine", "count : twenty-one", "copy : cat moon river =")


def export(*arguments: object) -> None:
    """Run dora-export as a user would, showing the command."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ dora-export {shlex.join(words)}", flush=True)
    program = Path(sys.executable).parent / "dora-export"
    subprocess.run([program, *words], check=True, cwd=ROOT)


def answers(folder: Path) -> list[str]:
    """What the model in `folder` says to each prompt, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said.append(
            tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return said


@contextmanager
def server(log: Path) -> Iterator[str]:
    """The URL of a `dora-serve up models`, ready; it logs to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"\n$ dora-serve up models --port {port}\n", flush=True)
    program = Path(sys.executable).parent / "dora-serve"
    with log.open("w") as said:
        process = subprocess.Popen(
            [program, "up", "models", "--port", str(port)], cwd=ROOT, stdout=said, stderr=said
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                urlopen(f"{url}/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def post(url: str, **body: object) -> dict[str, Any]:
    data = json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def ask(url: str) -> None:
    """Everything that is served, one question each."""
    with urlopen(f"{url}/v1/models", timeout=60) as answer:
        names = [card["id"] for card in json.load(answer)["data"]]
    print("\nThe same prompt, asked of the server by each model's name:\n")
    for name in names:
        if "Llama" in name or "llama" in name:
            said = post(
                f"{url}/v1/completions", model=name, prompt=PROMPTS[0], max_tokens=8, temperature=0
            )
            print(f"  {name:<28} {said['choices'][0]['text']}")
        elif name.endswith("Sentiment--1"):
            found = post(f"{url}/classify", model=name, input=SENTENCE)["data"][0]
            print(f"  {name:<28} {SENTENCE!r} is {found['label']} ({max(found['probs']):.1%})")
    print(
        "\nThe same with a page to try it on: `.venv/bin/dora-serve up models`, then open "
        "http://127.0.0.1:8000/"
    )


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out").resolve()
    merged, adapter = out / "merged", out / "adapter"
    export("inspect", RUN, "--base", BASE)
    export("merge", RUN, merged, "--base", BASE, "--force")
    export("verify", RUN, merged, "--base", BASE)
    export("adapter", RUN, adapter, "--base", BASE, "--target", "vllm", "--force")
    export("verify", RUN, adapter, "--base", BASE)
    print("\nThe same prompts, asked of the base and of the merged model:\n")
    for prompt, base, tuned in zip(PROMPTS, answers(ROOT / BASE), answers(merged), strict=True):
        print(f"  {prompt}\n    base    {base}\n    merged  {tuned}")
    with server(out / "server.log") as url:
        ask(url)


if __name__ == "__main__":
    main()
