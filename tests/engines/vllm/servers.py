"""Starting real vLLM servers on the CPU, and what their answers must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import openai

from converters.model.base import open_base
from dora_serve import read_run
from dora_serve.proof.live import LiveModel
from dora_serve.proof.vllm import greedy

DORA_SERVE = Path(sys.executable).parent / "dora-serve"
# A short context and little memory, so that a server starts beside other work.
SMALL = ("--max-model-len", "64", "--enforce-eager", "--kv-cache-memory-bytes", "200000000")


BASE = "tiny-llama-base"
AT_START = "--rank=2, 模型"  # a run that no other test changes
RUNS = Path("runs", "Checkpoint", "Tiny_Llama", "Lora_Rank=8")
KEY = "sesame"
COUNT = 12
TOLD = {"count : nine": COUNT, "count : thirty": COUNT, "copy : cat moon river =": 6}


def apart(count: Callable[[], int]) -> int:
    """What a function of a module returns in a process of its own: where many of vLLM's classes
    were imported, it starts no engine any more."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(count).result()


def ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def wait_until(true: Callable[[], object], seconds: float = 600) -> None:
    """Wait until `true()` is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


@contextmanager
def server(words: Sequence[object], url: str, log: Path, **env: str) -> Iterator[subprocess.Popen]:  # type: ignore[type-arg]
    """A process that serves `url`, ready when entered, ended when left."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
            preexec_fn=_give_way,
        )
    try:
        wait_until(lambda: ready(url) or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-3000:]
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)


def _give_way() -> None:
    """vLLM's processes wait for one another in loops of `sched_yield`, beside which Linux 6.18
    leaves others without a processor for minutes: `import torch` took 58 s for 2."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@cache  # each opens the system's certificates anew, which takes 0.1 s
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def ask(url: str, model: str, prompt: str) -> list[int]:
    answer = client(url).completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOLD[prompt],
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
    return tokens


def live_tokens(run: Path, base: Path, prompt: list[int], count: int) -> list[int]:
    """What the live, unmerged run says after `prompt`, greedily."""
    return greedy(LiveModel(read_run(run), open_base(base)).model, prompt, count)


def runs(folder: Path) -> dict[str, Path]:
    names = ("Tiny_Llama--Count_Down--1", "Tiny_Llama--Every_Second--1")
    found = {name: folder / RUNS / name.split("--")[1] / name for name in names}
    return {**found, "ada": folder / "ada"}


def everyone_is_right(url: str, expected: dict[tuple[str, str], list[int]]) -> None:
    """All models and prompts at once, twice over, mixed in the same batches."""
    asked = list(expected) * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda pair: ask(url, *pair), asked))
    assert dict(zip(asked, answers, strict=True)) == expected
    assert answers == [expected[pair] for pair in asked]
