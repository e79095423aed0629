"""Time and memory of a merge: `cp -r`, dora-export, and PEFT, in one table.

    python scripts/bench_merge.py [--layers 20] [--runs 3] [--folder /dev/shm --folder /var/tmp]

Makes a random bf16 Llama (hidden 2048, 1.1 B parameters at 22 layers) in three shards and a rank-8
adapter on all linear layers, then runs each variant in a process of its own, `--runs` times, and
prints medians: the start of interpreter and torch by itself, then the work. On disk every variant
ends with a flush, since dora-export flushes what it wrote.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_GATE = "print('ready', flush=True); sys.stdin.readline()"
_OURS = f"""
import sys, torch
{_GATE}
from dora_serve.commands import run_export
sys.argv = ["dora-export", "merge", *sys.argv[1:], "--json"]
run_export()
"""
_PEFT = f"""
import sys, torch
{_GATE}
from peft import PeftModel
from transformers import AutoModelForCausalLM
adapter, out, _, base = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(
    out, max_shard_size="800MB")
"""


@dataclass
class Measure:
    """`start`: seconds until the interpreter and torch are up; `work`: seconds after that."""

    start: float
    work: float
    rss: float
    anonymous: float


def measure(command: list[str], warm: tuple[Path, Path], flush: Path | None) -> Measure:
    """Run `command` up to its gate, make and delete a copy of the base, open the gate.

    The copy leaves the kernel with as much free memory of its own for every variant: a virtual
    machine's host takes free memory back within seconds, and giving it anew costs as much as the
    merge. `flush` counts writing the output to the disk as part of the work.
    """
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        start = time.perf_counter() - begin
        subprocess.run(["cp", "-r", *map(str, warm)], check=True)
        shutil.rmtree(warm[1])
        begin = time.perf_counter()
        child.stdin.write("go\n")
        child.stdin.close()
        rss = anonymous = 0
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            rss = max(rss, _kilobytes(status, "VmHWM"))
            anonymous = max(anonymous, _kilobytes(status, "RssAnon"))
            time.sleep(0.03)
        if flush is not None:
            subprocess.run(["sync", *map(str, flush.iterdir())], check=True)
        work = time.perf_counter() - begin
        if child.returncode:
            raise SystemExit(f"{command} failed:\n{child.stderr.read()}")
    return Measure(start, work, rss / 1e3, anonymous / 1e3)


def _kilobytes(status: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0


def make_inputs(folder: Path, layers: int, hidden: int = 2048) -> tuple[Path, Path, int]:
    """A random base in shards of at most 800 MB and a rank-8 adapter; returns the bytes of both."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        vocab_size=32000,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base, max_shard_size="800MB")
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.02)
    peft.save_pretrained(adapter)
    torch.set_default_dtype(torch.float32)
    return base, adapter, sum(path.stat().st_size for path in base.iterdir())


def variants(base: Path, adapter: Path, out: Path) -> dict[str, list[str]]:
    arguments = [str(adapter), str(out), "--base", str(base)]
    return {
        "cp -r": ["sh", "-c", f"echo ready; read line; exec cp -r {base} {out}"],
        "dora-export merge": [sys.executable, "-c", _OURS, *arguments],
        "PEFT merge_and_unload": [sys.executable, "-c", _PEFT, *arguments],
    }


def bench(folder: Path, layers: int, runs: int, only: str | None) -> None:
    base, adapter, size = make_inputs(folder, layers)
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(
        f"\n{kind}: {size / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} shards, "
        f"{layers} layers, median of {runs}\n"
    )
    results: dict[str, list[Measure]] = {}
    out = folder / "out"
    for _ in range(runs):  # interleaved, so that a slow minute of the machine hits all alike
        for name, command in variants(base, adapter, out).items():
            if only is None or only in name or name == "cp -r":
                subprocess.run(["sync"], check=True)
                flush = None if kind == "tmpfs" else out
                results.setdefault(name, []).append(measure(command, (base, folder / "w"), flush))
                shutil.rmtree(out)
    print_table(results)


def print_table(results: dict[str, list[Measure]]) -> None:
    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(m, field) for m in results[name]))

    print("| variant | start s | work s | work, × cp | peak RSS MB | peak anonymous MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in results:
        work = median(name, "work")
        print(
            f"| {name} | {median(name, 'start'):.2f} | {work:.2f} "
            f"| {work / median('cp -r', 'work'):.2f} "
            f"| {median(name, 'rss'):.0f} | {median(name, 'anonymous'):.0f} |"
        )
    ours, peft = "dora-export merge", "PEFT merge_and_unload"
    if peft in results:
        work = median(peft, "work") / median(ours, "work")
        both = [median(name, "start") + median(name, "work") for name in (peft, ours)]
        print(
            f"\ndora-export is {work:.1f} × faster than PEFT, "
            f"{both[0] / both[1]:.1f} × with the start of the interpreter and torch"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, action="append", help="where; may be given again")
    parser.add_argument("--only", help="leave out variants without this in their name")
    options = parser.parse_args()
    for parent in options.folder or [Path("/dev/shm"), Path("/var/tmp")]:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            begin = time.perf_counter()
            bench(Path(folder), options.layers, options.runs, options.only)
            print(f"(measured in {time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
