"""The commands that take a run on real weights into production, each in a process of its own, and
what they cost; and what `dora-serve up` answers beside the live models."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import gguf
import torch
import transformers

from converters.model.base import BaseModel, open_base
from converters.run import Run
from converters.updates.rank_one import RankOneSum
from dora_serve.proof.live import truth_of

COMMANDS = Path(sys.executable).parent
# Artifact → what makes it of a run.
WAYS = {
    "merged": ("merge", "--dtype", "float32"),
    "merged bf16": ("merge", "--dtype", "bfloat16"),
    "merged fp16": ("merge", "--dtype", "float16"),
    "adapter": ("adapter",),
    "adapter for vLLM": ("adapter", "--target", "vllm"),
    "adapter for llama.cpp": ("adapter", "--target", "gguf"),
    "ONNX fp32": ("onnx",),
    "ONNX fp16": ("onnx", "--precision", "fp16"),
    "ONNX int8": ("onnx", "--precision", "int8"),
    "ONNX int4": ("onnx", "--precision", "int4"),
}
# Runs a command, ends it when it is ended itself, and prints its largest resident memory: a small
# process, since that of who starts another is counted for it.
MEASURE = """
import resource, signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
code = child.wait()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(max(code, 0))
"""
TEXT = "The rank of a matrix is"


class Refused(Exception):
    """A command ended with an error of its own."""


NEW = 24  # tokens of an answer


@dataclass(frozen=True)
class Cost:
    """What a command wrote and its largest resident memory, in bytes, and the seconds it took."""

    written: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.written / 1e6:.1f} | {self.memory / 1e6:.0f} | {self.seconds:.1f}"


def made(words: tuple[object, ...], out: Path) -> Cost:
    """Run `dora-export` with `words`, which writes `out`."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    memory = _ended(_started(COMMANDS / "dora-export", *words, "--quiet"))
    return Cost(_size(out), memory, time.perf_counter() - begin)


def _started(*words: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MEASURE, *(str(word) for word in words)]
    told = {**os.environ, **environment}
    return subprocess.Popen(command, env=told, stdout=subprocess.PIPE, text=True)


def _ended(process: subprocess.Popen[str]) -> int:
    """The largest resident memory of what `process` measured, in bytes."""
    told, _ = process.communicate()
    if process.returncode == 1:
        raise Refused(process.args)
    if process.returncode:
        raise SystemExit(f"{process.args!r}: {process.returncode}")
    return int(told)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def gguf_difference(run: Run, folder: Path, base: Path) -> float:
    """The largest difference between an update in the GGUF adapter `folder`, as gguf's reader and
    its table of names tell it, and that of `run`. Of matrices whose rows llama.cpp orders in its
    own way the norms of the columns are compared."""
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    tensors = {t.name: torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    kind = reader.fields["general.architecture"].contents()
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    table = gguf.get_tensor_name_map(known, layers)
    largest = 0.0
    for module, update in run.strip().updates.items():
        assert isinstance(update, RankOneSum)
        name = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        b, a = tensors.pop(f"{name}.lora_b"), tensors.pop(f"{name}.lora_a")
        found = (b @ a) * (alpha / len(a))
        trained = (update.b.double() * update.c.double()) @ update.a.double()
        if module.endswith(("q_proj", "k_proj")):
            found, trained = found.norm(dim=0), trained.norm(dim=0)
        largest = max(largest, float((found - trained).abs().max()))
    if tensors:
        raise SystemExit(f"{folder}: {', '.join(tensors)} is of no matrix of the run")
    return largest


def served(base: Path, runs: Mapping[str, Run], work: Path) -> tuple[dict[str, float], Cost]:
    """`runs` in `dora-serve up`, with an empty cache: the difference of each one's answers to its
    live model, and the cost until each had answered once."""
    folder, cache = work / "served", work / "cache"
    names = {name: name.replace(" ", "-") for name in runs}
    for name, run in runs.items():
        shutil.copytree(run.files[0].parent, folder / names[name])
        for info in (work / "runs").rglob("task_info.json"):  # which the method keeps elsewhere
            if run.method != "peft_lora":
                shutil.copy(info, folder / names[name])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url, begin = f"http://127.0.0.1:{port}", time.perf_counter()
    words = (COMMANDS / "dora-serve", "up", folder, "--base", base, "--port", port)
    told = {"DORA_SERVE_CACHE": str(cache)}
    process = _started(*words, "--precision", "fp32", "--quiet", **told)
    ids = transformers.AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    try:
        while process.poll() is None and not _ready(url):
            time.sleep(0.1)
        answers = {name: _ask(url, names[name], ids, run) for name, run in runs.items()}
        seconds = time.perf_counter() - begin
    finally:
        process.terminate()
        memory = _ended(process)
    opened = open_base(base)
    found = {name: _difference(answers[name], ids, run, opened) for name, run in runs.items()}
    return found, Cost(_size(cache), memory, seconds)


def _ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _ask(url: str, model: str, ids: list[int], run: Run) -> Any:
    """The answer of `model` to `ids`: classes, or the greedy text with its log-probabilities."""
    body: dict[str, Any] = {"input": ids}
    way = "/classify"
    if run.task == "causal-lm":
        greedy = {"max_tokens": NEW, "temperature": 0, "logprobs": 1, "return_token_ids": True}
        way, body = "/v1/completions", {"prompt": ids, **greedy}
    data = json.dumps({"model": model, **body}).encode()
    request = Request(url + way, data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as answer:
        return json.load(answer)


def _difference(answer: Any, ids: list[int], run: Run, base: BaseModel) -> float:
    """Between an answer and the live model: of the chosen tokens' log-probabilities, or of the
    classes' probabilities. Infinite where the live model chooses another token."""
    live = truth_of(run, base).model.eval()
    choice = answer["choices"][0] if "choices" in answer else None
    tokens = choice["token_ids"] if choice else []
    with torch.inference_mode():
        logits = live(torch.tensor([[*ids, *tokens]])).logits[0]
    if choice is None:
        true = logits.softmax(-1)
        return float((torch.tensor(answer["data"][0]["probs"]) - true).abs().max())
    chosen = logits[len(ids) - 1 : -1].log_softmax(-1).max(-1)
    if tokens != chosen.indices.tolist():
        return float("inf")
    told = torch.tensor(choice["logprobs"]["token_logprobs"])
    return float((told - chosen.values).abs().max())
