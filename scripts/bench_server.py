"""Servers under load on one machine: ours, `transformers serve` and vLLM, with the same prompts.

    python scripts/bench_server.py [--clients 1 8 32] [--vllm .venv-vllm/bin/python] [--tiny]

The model is a random Llama of 0.3 billion parameters in float32; its merged form is one of eight
adapters of mixed ranks folded in. Every client sends one streamed chat after the other, of 64
tokens in and 32 out. *engine* is our continuous batching without HTTP. One server runs at a time,
in a process of its own; times are the median and the 95th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dora_serve.vllm.command import find_vllm

ADAPTERS = [f"a{number}" for number in range(8)]
PROMPT, NEW = 64, 32
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
TINY = {**SHAPE, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "intermediate_size": 256}
PORT = 8765
URL = f"http://127.0.0.1:{PORT}"


@dataclass
class Load:
    """What the clients saw, seconds. `gaps`: between the tokens of an answer."""

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0

    def cells(self) -> str:
        first, gaps = np.array(self.first) * 1e3, np.array(self.gaps) * 1e3
        times = [np.percentile(each, p) for each in (first, gaps) for p in (50, 95)]
        speeds = (self.requests / self.seconds, self.tokens / self.seconds)
        return " | ".join([*(f"{v:.2f}" for v in speeds), *(f"{v:.1f}" for v in times)])


def make_models(folder: Path, shape: dict[str, Any]) -> None:
    """`base`, eight adapters and `merged` as Hugging Face folders, and `merged` as ONNX."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dora_serve import merge, read_run, write_onnx

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # the end token, so that no answer is short
    base = folder / "all" / "base"
    model.save_pretrained(base)
    _tokenizer(base)
    make_adapters(base, folder / "all")
    run = read_run(folder / "all" / ADAPTERS[0])
    merge(run, folder / "merged", base=base)
    write_onnx(base, folder / "one" / "merged", run=run)


def make_adapters(base: Path, folder: Path) -> None:
    """`ADAPTERS` of a Llama as PEFT saves them, their ranks 1 to 16 from matrix to matrix."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for number, name in enumerate(ADAPTERS):
        ranks = {kind: 1 + (3 * number + 5 * i) % 16 for i, kind in enumerate(kinds)}
        lora = LoraConfig(
            r=8, rank_pattern=ranks, target_modules=list(kinds), task_type="CAUSAL_LM"
        )
        peft = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                if "lora_" in parameter_name:
                    parameter.normal_(0, 0.02)
        peft.save_pretrained(folder / name)


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    vocabulary = [*special.values(), *(f"w{i}" for i in range(4, 32000))]
    ids = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": word for name, word in special.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def ids(number: int) -> list[int]:
    """The prompt of one request."""
    return [4 + (7 * i + 13 * number) % 31990 for i in range(PROMPT)]


async def ask(http: Any, model: str, number: int, load: Load) -> None:
    content = " ".join(f"w{i}" for i in ids(number))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NEW,
        "temperature": 0,
        "stream": True,
    }
    begin = last = time.perf_counter()
    tokens = 0
    async with http.stream("POST", f"{URL}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:]).get("choices")
            if not choices or not choices[0]["delta"].get("content"):
                continue
            now = time.perf_counter()
            (load.gaps if tokens else load.first).append(now - (last if tokens else begin))
            last, tokens = now, tokens + 1
    load.requests += 1
    load.tokens += NEW


async def drive(models: Sequence[str], clients: int, each: int) -> Load:
    """`clients` at once, each with `each` requests one after the other; client i asks model i."""
    import httpx

    load = Load()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        await asyncio.gather(*(ask(http, model, 1, Load()) for model in dict.fromkeys(models)))
        begin = time.perf_counter()

        async def client(number: int) -> None:
            for turn in range(each):
                model = models[number % len(models)]
                await ask(http, model, 1000 * number + turn, load)

        await asyncio.gather(*(client(number) for number in range(clients)))
        load.seconds = time.perf_counter() - begin
    return load


def drive_engine(folder: Path, clients: int, each: int, threads: int) -> Load:
    """As `drive`, without HTTP: from threads of this process."""
    from dora_serve.onnxruntime.continuous import ContinuousDecoder
    from dora_serve.onnxruntime.decoder_graph import DecoderGraph
    from dora_serve.onnxruntime.request import Delta
    from dora_serve.onnxruntime.sampling import Sampling

    engine, load = ContinuousDecoder(DecoderGraph(folder, threads)), Load()
    sampling = Sampling(max_tokens=NEW, ignore_eos=True)

    def client(number: int) -> None:
        for turn in range(each):
            done = threading.Event()
            times = [time.perf_counter()]

            def tell(delta: Delta, times: list[float] = times, done: Any = done) -> None:
                times.append(time.perf_counter())
                if delta.reason is not None:
                    done.set()

            engine.submit(ids(1000 * number + turn), None, [sampling], [tell])
            done.wait()
            gaps = np.diff(times).tolist()
            load.first.append(gaps[0])
            load.gaps.extend(gaps[1:])

    begin = time.perf_counter()
    workers = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    load.seconds = time.perf_counter() - begin
    load.requests, load.tokens = clients * each, clients * each * NEW
    engine.close()
    return load


@contextmanager
def serving(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """A server's process while it runs; its output goes to a file that is shown when it fails."""
    import httpx

    with suppress(httpx.TransportError):
        httpx.get(f"{URL}/health")
        raise SystemExit(f"another server answers at {URL}")
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, **environment}
        )
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(log.read_text()[-3000:])
            try:
                if httpx.get(f"{URL}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def variants(folder: Path, vllm: Path | None, threads: int) -> dict[str, tuple[Any, list[str]]]:
    """Name → (command and environment of the server, or an ONNX folder; the models to ask)."""
    start = (
        "import sys; from pathlib import Path; from dora_serve.server.up import up;"
        "from dora_serve.server.options import ServerOptions;"
        f"up(Path(sys.argv[1]), None, '127.0.0.1', {PORT}, None, False, ServerOptions({threads}))"
    )
    ours = [sys.executable, "-c", start]
    cache = {"DORA_SERVE_CACHE": str(folder / "cache")}
    port = ["--port", str(PORT)]
    merged = str(folder / "merged")
    peer = [str(Path(sys.executable).parent / "transformers"), "serve", merged, *port]
    peer += ["--device", "cpu", "--dtype", "float32"]
    few = {"OMP_NUM_THREADS": str(threads)}
    found: dict[str, tuple[Any, list[str]]] = {
        "engine, merged": (folder / "one" / "merged", []),
        "ours, merged": (([*ours, str(folder / "one")], cache), ["merged"]),
        "ours, 8 adapters": (([*ours, str(folder / "all")], cache), ADAPTERS),
        "transformers serve": ((peer, few), [merged]),
        "transformers serve, continuous": (([*peer, "--continuous-batching"], few), [merged]),
    }
    if vllm is not None:
        quiet = {**few, "VLLM_NO_USAGE_STATS": "1"}
        common = [
            "--dtype",
            "float32",
            "--max-model-len",
            "1024",
            "--kv-cache-memory-bytes",
            "2000000000",
            *port,
        ]
        program = find_vllm(str(vllm))
        plain = [*program, "--model", merged, *common]
        many = [*program, "--model", str(folder / "all" / "base"), *common, "--enable-lora"]
        many += ["--max-loras", "8", "--max-lora-rank", "16", "--lora-modules"]
        many += [f"{name}={folder / 'all' / name}" for name in ADAPTERS]
        found["vLLM, merged"] = ((plain, quiet), [merged])
        found["vLLM, 8 adapters"] = ((many, quiet), ADAPTERS)
    return found


def measure(
    name: str, how: Any, models: list[str], options: argparse.Namespace, folder: Path
) -> None:
    if isinstance(how, Path):
        for clients in options.clients:
            command = [sys.executable, __file__, "--engine", str(how), "--threads"]
            command += [str(options.threads), "--clients", str(clients), "--each"]
            command += [str(options.each)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(f"| {name} | {clients} | {done.stdout.strip()} |", flush=True)
        return
    command, environment = how
    with serving(command, folder, environment):
        for clients in options.clients:
            load = asyncio.run(drive(models, clients, options.each))
            print(f"| {name} | {clients} | {load.cells()} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--each", type=int, default=4, help="requests of a client")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--vllm", type=Path, help="its program or its Python, to be measured as well"
    )
    parser.add_argument("--only", help="variants whose name begins so")
    parser.add_argument("--folder", type=Path, help="where the models are made, and kept")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to try the script")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        load = drive_engine(options.engine, options.clients[0], options.each, options.threads)
        print(load.cells())
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-server"))
    try:
        if not (folder / "one").exists():
            make_models(folder, TINY if options.tiny else SHAPE)
        print(
            "| server | clients | requests/s | tokens/s | first token, ms | p95 | token, ms | p95 |"
        )
        print(f"|---|{'---:|' * 7}")
        for name, (how, models) in variants(folder, options.vllm, options.threads).items():
            if name.startswith(options.only or ""):
                measure(name, how, models, options, folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
