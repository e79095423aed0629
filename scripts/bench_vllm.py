"""vLLM with and without a plan: base, merged, one adapter, eight mixed, and what padding costs.

    .venv-vllm/bin/python scripts/bench_vllm.py [serve] [padding] [--clients 8] [--requests 32]

A random Llama of 0.1 billion parameters and eight adapters as dynamic-rank training leaves them:
start rank 12, a mean of 6, some matrices pruned away. Every variant is a vLLM server of its own,
asked by concurrent clients. *naive* is what one does without `dora-serve plan`: every adapter at
its uniform start rank on all linear layers, and no `--lora-target-modules`. Runs on whatever device
vLLM finds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from dora_serve import merge, read_run, write_adapter
from dora_serve.folder.inventory import discover
from dora_serve.vllm.command import command_line, serve_options
from dora_serve.vllm.fleet import STEPS, Pool, plan_fleet

ADAPTERS, START, PROMPT, NEW = 8, 12, 32, 32
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = {
    "hidden_size": 768,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
SMALL = ["--max-model-len", "256", "--kv-cache-memory-bytes", "1000000000", "--enforce-eager"]
SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def make(folder: Path) -> Pool:
    """The base, `run-N` as trained, `ours-N` by the writer, `naive-N` of uniform rank, `merged`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32000)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "base")
    generator = random.Random(0)
    for i in range(ADAPTERS):
        adapter(folder, f"runs/run-{i}", lambda: max(0, generator.randint(-2, START)))
        adapter(folder, f"naive/naive-{i}", lambda: START)
    base = folder / "base"
    merge(read_run(folder / "runs" / "run-0"), folder / "merged", base=base)
    (pool,) = plan_fleet(discover(folder / "runs", base)).pools
    for name in pool.ranks:
        write_adapter(folder / "runs" / name, folder / "ours" / name, base=base, target="vllm")
        write_adapter(
            folder / "runs" / name, folder / "fitted" / name, base=base, target="vllm", max_rank=8
        )
    return pool


def adapter(folder: Path, name: str, rank: Any) -> None:
    """A random PEFT adapter whose matrices have the ranks that `rank()` gives."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    ranks = {
        f"model.layers.{layer}.{part}.{kind}": rank()
        for layer in range(CONFIG["num_hidden_layers"])
        for kind in KINDS
        for part in ("self_attn" if kind[0] in "qkvo" else "mlp",)
    }
    kept = {module: r for module, r in ranks.items() if r}
    config = LoraConfig(
        r=START,
        lora_alpha=START,
        target_modules=list(kept),
        rank_pattern={f"^{module}": r for module, r in kept.items() if r != START},
        alpha_pattern={f"^{module}": r for module, r in kept.items() if r != START},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder / name)


def lora(names: list[Path], rank: int, slots: int) -> list[str]:
    words = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots)]
    return [*words, "--lora-modules", *(f"{path.name}={path}" for path in names)]


class Served:
    """A server, ready when entered."""

    def __init__(self, words: list[str], log: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._words = [*words, "--port", str(port), "--host", "127.0.0.1"]
        self._log = log

    def __enter__(self) -> Served:
        self._process = subprocess.Popen(
            self._words,
            stdout=self._log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while True:
            try:
                urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError:
                if self._process.poll() is not None:
                    raise SystemExit(self._log.read_text()[-3000:]) from None
                time.sleep(0.5)

    def memory(self) -> float:
        """Megabytes of its processes, without what they share."""
        import psutil

        top = psutil.Process(self._process.pid)
        own = [p.memory_full_info().uss for p in [top, *top.children(recursive=True)]]
        return float(sum(own)) / 1e6

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()


async def load(url: str, models: list[str], clients: int, requests: int) -> dict[str, float]:
    """`requests` requests by `clients` clients, the models in turn."""
    import openai

    rng = random.Random(1)
    firsts: list[float] = []
    steps: list[float] = []
    waiting = list(range(requests))

    async def one(number: int) -> None:
        ids = [rng.randrange(10, 32000) for _ in range(PROMPT)]
        began = time.perf_counter()
        stream = await client.completions.create(
            model=models[number % len(models)],
            prompt=ids,
            max_tokens=NEW,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        times = [time.perf_counter() async for chunk in stream if chunk.choices]
        firsts.append(times[0] - began)
        steps.append((times[-1] - times[0]) / (NEW - 1))

    async def asking() -> None:
        while waiting:
            await one(waiting.pop())

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
        await asyncio.gather(*(one(i) for i in range(len(models))))  # loads, compiles
        firsts.clear()
        steps.clear()
        began = time.perf_counter()
        await asyncio.gather(*(asking() for _ in range(clients)))
        seconds = time.perf_counter() - began
    return {
        "req/s": requests / seconds,
        "first token ms": 1000 * statistics.median(firsts),
        "per token ms": 1000 * statistics.median(steps),
    }


def measure(
    words: list[str], models: list[str], options: argparse.Namespace, folder: Path
) -> dict[str, float]:
    with Served([*SERVER, *words, *SMALL], folder / "server.log") as served:
        found = asyncio.run(load(served.url, models, options.clients, options.requests))
        return {**found, "memory MB": served.memory()}


def serve(folder: Path, pool: Pool, options: argparse.Namespace) -> None:
    base = ["--model", str(folder / "base"), "--served-model-name", "base", "--dtype", "float32"]
    merged = ["--model", str(folder / "merged"), "--served-model-name", "m", "--dtype", "float32"]
    ours = {name: folder / "ours" / name for name in pool.ranks}
    planned = command_line(serve_options(pool, ours, gpu=False), [])
    fitted_paths = {name: folder / "fitted" / name for name in pool.ranks}
    (fitted,) = plan_fleet(discover(folder / "fitted", folder / "base")).pools
    small = command_line(serve_options(fitted, fitted_paths, gpu=False), [])
    naive = sorted((folder / "naive").iterdir())
    step = next(s for s in STEPS if s >= START)
    variants: dict[str, tuple[list[str], list[str], int | None]] = {
        "base": (base, ["base"], None),
        "merged": (merged, ["m"], None),
        "one adapter, plan": (planned, list(ours)[:1], pool.slot * pool.max_loras),
        "8 adapters, naive": (
            [*base, *lora(naive, step, ADAPTERS)],
            [path.name for path in naive],
            pool.naive_slot * ADAPTERS,
        ),
        "8 adapters, plan": (planned, list(ours), pool.slot * pool.max_loras),
        "8 adapters, plan, fitted to rank 8": (
            small,
            list(ours),
            fitted.slot * fitted.max_loras,
        ),
    }
    table("variant", variants, options, folder)


def padding(folder: Path, options: argparse.Namespace) -> None:
    """The same eight adapters of rank up to 8, in slots of ever more room."""
    adapters = sorted((folder / "fitted").iterdir())
    base = ["--model", str(folder / "base"), "--served-model-name", "base", "--dtype", "float32"]
    (pool,) = plan_fleet(discover(folder / "fitted", folder / "base")).pools
    variants = {
        f"{rank}": (
            [*base, *lora(adapters, rank, ADAPTERS), "--lora-target-modules", *pool.target_modules],
            [path.name for path in adapters],
            pool.slot_bytes(rank, pool.target_modules) * ADAPTERS,
        )
        for rank in STEPS
        if 8 <= rank <= 256
    }
    table("--max-lora-rank", variants, options, folder)  # type: ignore[arg-type]


def table(
    title: str,
    variants: dict[str, tuple[list[str], list[str], int | None]],
    options: argparse.Namespace,
    folder: Path,
) -> None:
    print(f"\n| {title} | req/s | × | first token ms | per token ms | slots MB | memory MB |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    first = None
    for name, (words, models, slots) in variants.items():
        found = measure(words, models, options, folder)
        first = first or found["req/s"]
        print(
            f"| {name} | {found['req/s']:.2f} | {found['req/s'] / first:.2f} "
            f"| {found['first token ms']:.0f} | {found['per token ms']:.1f} "
            f"| {'' if slots is None else f'{slots / 1e6:.1f}'} | {found['memory MB']:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["serve", "padding"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = make(folder)
        if "serve" in options.what:
            serve(folder, pool, options)
        if "padding" in options.what:
            padding(folder, options)


if __name__ == "__main__":
    main()
