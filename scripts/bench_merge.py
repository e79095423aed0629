"""Time and memory of a merge: `cp -r`, dora-export, and PEFT, in one table.

    python scripts/bench_merge.py [--layers 20] [--runs 3] [--folder /dev/shm --folder /var/tmp]

Makes a random bf16 Llama (hidden 2048, 1.1 B parameters at 22 layers) in three shards and a rank-8
adapter on all linear layers, then runs each variant in a process of its own, `--runs` times, and
prints medians. On disk every variant ends with a flush, since dora-export flushes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_MEASURE = """
import json, os, resource, subprocess, sys, threading, time
peak = 0
def anonymous(pid):
    try:
        for line in open(f"/proc/{pid}/smaps_rollup"):
            if line.startswith("Anonymous:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
def watch():
    global peak
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.02)
watcher = threading.Thread(target=watch); watcher.start()
code = child.wait(); seconds = time.perf_counter() - start; watcher.join()
rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": code, "seconds": seconds, "rss": rss, "anonymous": peak}))
"""

_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(
    out, max_shard_size="800MB")
"""


@dataclass
class Measure:
    seconds: float
    rss: float
    anonymous: float


def measure(command: list[str]) -> Measure:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=True
    )
    values = json.loads(done.stdout.splitlines()[-1])
    if values["code"]:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    return Measure(values["seconds"], values["rss"] / 1e3, values["anonymous"] / 1e3)


def make_inputs(folder: Path, layers: int) -> tuple[Path, Path, int]:
    """A random base in shards of at most 800 MB and a rank-8 adapter; returns the bytes of both."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        vocab_size=32000,
        num_attention_heads=32,
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


def variants(base: Path, adapter: Path, out: Path, flush: bool) -> dict[str, list[str]]:
    def shell(command: str) -> list[str]:
        return ["sh", "-c", f"{command} && sync {out}/*" if flush else command]

    export = Path(sys.executable).parent / "dora-export"
    return {
        "cp -r": shell(f"cp -r {base} {out}"),
        "import torch": [sys.executable, "-c", "import torch"],
        "dora-export merge": [
            str(export),
            "merge",
            str(adapter),
            str(out),
            "--base",
            str(base),
            "--json",
        ],
        "PEFT merge_and_unload": shell(
            f"{sys.executable} {adapter}/peft_merge.py {base} {adapter} {out}"
        ),
    }


def bench(folder: Path, layers: int, runs: int, only: str | None) -> None:
    base, adapter, size = make_inputs(folder, layers)
    (adapter / "peft_merge.py").write_text(_PEFT)
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(
        f"\n{kind}: {size / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} shards, "
        f"{layers} layers, median of {runs}\n"
    )
    results: dict[str, list[Measure]] = {}
    commands = variants(base, adapter, folder / "out", flush=kind != "tmpfs")
    for _ in range(runs):  # interleaved, so that a slow minute of the machine hits all alike
        for name, command in commands.items():
            if only is None or only in name or name in ("cp -r", "import torch"):
                subprocess.run(["sync"], check=True)
                results.setdefault(name, []).append(measure(command))
                shutil.rmtree(folder / "out", ignore_errors=True)
    print_table(results)


def print_table(results: dict[str, list[Measure]]) -> None:
    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(m, field) for m in results[name]))

    copy, start = median("cp -r", "seconds"), median("import torch", "seconds")
    print("| variant | seconds | beyond torch's start | × cp | peak RSS MB | peak anonymous MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in results:
        seconds = median(name, "seconds")
        beyond = seconds if name == "cp -r" else max(0.0, seconds - start)
        print(
            f"| {name} | {seconds:.2f} | {beyond:.2f} | {beyond / copy:.2f} "
            f"| {median(name, 'rss'):.0f} | {median(name, 'anonymous'):.0f} |"
        )
    ours = "dora-export merge"
    if "PEFT merge_and_unload" in results:
        ratio = median("PEFT merge_and_unload", "seconds") / median(ours, "seconds")
        print(f"\ndora-export is {ratio:.1f} × faster than PEFT, start of the interpreter included")


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
