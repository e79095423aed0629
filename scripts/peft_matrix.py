"""Write docs/peft.md: PEFT's own test configurations through merge, adapter and verify.

    python scripts/peft_matrix.py TESTS [--only PATTERN] [--output docs/peft.md]

TESTS is the folder `tests` of a checkout of huggingface/peft. Its tables of tuners and options are
read from there, never imported. Each configuration is put on a small transformers model with
random weights, its adapter gets random weights, and the truth is PEFT's live model in a fresh load.
Tables for models that are no transformers classes (an MLP, convolutions) are mapped to classes
with such layers, and keep their options.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft_cases import MODELS, Case, cases

from converters.errors import DoraExportError
from converters.readers import ReadOptions, read_run
from converters.run import Run
from dora_serve import api
from dora_serve.proof.verify import verify

BOUND = 1e-4
EQUAL, REFUSED, DIFFERENT, TRACEBACK = "equal", "refused", "different", "traceback"
NOT_MADE = "not made by PEFT"
VERBS = ("merge", "adapter", "verify")

HEAD = """# PEFT's own configurations

The tables of tuners and options that PEFT {version} tests itself with, {count} configurations, each
on a small model of transformers with random weights: PEFT makes and saves the adapter with random
weights, `merge`, `adapter` (for PEFT) and `verify` take it, and what transformers or PEFT then
loads is compared with PEFT's live model. Equal means within 1e-4 of the largest value.

Models of PEFT's tests that are no classes of transformers became the nearest ones: convolutions are
those of ViT, VideoMAE, ConvNeXT, RegNet and DeBERTa, torch's MultiheadAttention is SigLIP's, the
Conv1D is GPT-2's. Of adapters that PEFT tests in pairs each is one, and of Stable Diffusion it is
the text encoder, CLIP's. Tables of quantized layers and of mixed tuners are left out.

Made by `python scripts/peft_matrix.py TESTS --output docs/peft.md`, with the folder `tests` of a
checkout of huggingface/peft (`make peft-matrix PEFT_TESTS=TESTS`); some minutes on one core. One
configuration of each kind is in the test suite (`tests/converters/test_peft_layers.py`).
"""


def make(name: str, folder: Path) -> Any:
    """Save a model of ours with random weights, wide enough for updates to be seen; returns it."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 and parameter.std() < 0.1 else 1.0)
    model.save_pretrained(folder)
    return model


def load(model: Any, folder: Path) -> Any:
    """`model` as loading it from `folder` gives it, which names it in PEFT's configuration."""
    fresh = copy.deepcopy(model)
    fresh.config._name_or_path = fresh.name_or_path = str(folder)
    return fresh


def outputs(model: Any) -> torch.Tensor:
    """All that the model computes, from inputs longer than any window of ours."""
    seed = torch.Generator().manual_seed(3)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = [config.num_channels, config.image_size, config.image_size]
        frames = [config.num_frames] if hasattr(config, "num_frames") else []
        inputs = {"pixel_values": torch.randn(3, *frames, *size, generator=seed)}
    else:
        inputs = {"input_ids": torch.randint(1, 96, (3, 64), generator=seed)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(1, 96, (3, 32), generator=seed)
    with torch.no_grad():
        found = model(**inputs)
    wanted = ("logits", "last_hidden_state", "pooler_output")
    return torch.cat([found[key].float().flatten() for key in wanted if found.get(key) is not None])


def train(case: Case, model: Any, out: Path) -> None:
    """An adapter of `model` whose every trained number was moved, as PEFT saves it."""
    torch.manual_seed(0)
    tuned = get_peft_model(model, case.config(**copy.deepcopy(case.options)))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    tuned.save_pretrained(out)


def run(case: Case, base: Path, model: Any, work: Path) -> dict[str, str]:
    """Verb → what became of it, and why; `model` is the base, loaded."""
    adapter, merged, written = work / "run", work / "merged", work / "written"
    try:
        train(case, load(model, base), adapter)
        live = PeftModel.from_pretrained(load(model, base), str(adapter)).eval()
        truth = outputs(live)
    except Exception as error:
        said = re.sub(r"\(nf=.*?\)|model\.\S+", "…", " ".join(str(error).split()))
        return dict.fromkeys(VERBS, f"{NOT_MADE}: {type(error).__name__}: {said[:120]}")
    without = outputs(model)
    same = without.shape == truth.shape  # prompt learning makes the output longer
    effect = float((without - truth).abs().max()) if same else float("inf")
    results = {} if effect > 100 * BOUND else {"effect": f"{effect:.1e}"}

    def judge(found: torch.Tensor) -> str:
        if found.shape != truth.shape:
            return f"{DIFFERENT}: {list(found.shape)} values"
        error = float((found - truth).abs().max())
        close = error <= BOUND * max(1.0, float(truth.abs().max()))
        return EQUAL if close and error <= effect / 20 else f"{DIFFERENT}: {error:.1e}"

    def attempt(verb: str, judged: Callable[[], str]) -> bool:
        try:
            results[verb] = judged()
        except DoraExportError as error:
            results[verb] = f"{REFUSED}: {' '.join(error.message.split())}"
        except Exception as error:
            results[verb] = f"{TRACEBACK}: {type(error).__name__}: {' '.join(str(error).split())}"
            traceback.print_exc()
        return results[verb] == EQUAL

    @cache
    def read() -> Run:
        return read_run(adapter, ReadOptions(base=base))

    def merge() -> str:
        api.merge(read(), merged, base=base)
        name = json.loads((merged / "config.json").read_text())["architectures"][0]
        return judge(outputs(getattr(transformers, name).from_pretrained(merged).eval()))

    def write() -> str:
        api.write_adapter(read(), written, base=base)
        return judge(outputs(PeftModel.from_pretrained(load(model, base), str(written)).eval()))

    def proof() -> str:
        result = verify(read(), merged, base)
        return EQUAL if result.passed else f"{DIFFERENT}: {result.max_abs:.1e}"

    if attempt("merge", merge):
        attempt("verify", proof)
    else:
        with contextlib.suppress(Exception):
            if judge(outputs(live.merge_and_unload())) == EQUAL:
                results["PEFT merges"] = "yes"
    attempt("adapter", write)
    return results


def table(title: str, rows: list[tuple[Case, str, bool]]) -> str:
    """Why, with the configurations and tuners that it concerns; how many of them PEFT merges."""
    groups: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for case, why, merges in rows:
        groups[why].append((case.config.__name__.removesuffix("Config"), merges))
    lines = [
        f"## {title}",
        "",
        "| why | configurations | PEFT merges | tuners |",
        "|---|--:|--:|---|",
    ]
    for why, found in sorted(groups.items(), key=lambda item: -len(item[1])):
        tuners = ", ".join(sorted({tuner for tuner, _ in found}))
        merged = sum(merges for _, merges in found)
        lines.append(f"| {why.replace('|', '/')} | {len(found)} | {merged or ''} | {tuners} |")
    return "\n".join([*lines, ""])


def page(results: list[tuple[Case, dict[str, str]]]) -> str:
    """The text of docs/peft.md."""
    counts = {
        verb: Counter(r.get(verb, "").partition(": ")[0] for _, r in results) for verb in VERBS
    }
    states = (EQUAL, REFUSED, DIFFERENT, TRACEBACK, NOT_MADE)
    lines = [HEAD.format(count=len(results), version=peft.__version__)]
    lines += ["| | " + " | ".join(states) + " |", "|---" + "|--:" * len(states) + "|"]
    lines += [f"| {v} | " + " | ".join(str(c[s]) for s in states) + " |" for v, c in counts.items()]
    parts = ["\n".join([*lines, ""])]

    def rows(state: str, verb: str, merged: bool = False) -> list[tuple[Case, str, bool]]:
        found = [(case, r, r.get(verb, "").partition(": ")) for case, r in results]
        return [
            (case, why, "PEFT merges" in r)
            for case, r, (own, _, why) in found
            if own == state and (not merged or r["merge"] == EQUAL)
        ]

    parts.append(table("Refused by merge, and so by all", rows(REFUSED, "merge")))
    parts.append(table("Merged, and refused as an adapter", rows(REFUSED, "adapter", True)))
    for verb in VERBS:
        for state in (DIFFERENT, TRACEBACK, *((REFUSED,) if verb == "verify" else ())):
            if wrong := rows(state, verb):
                parts.append(table(f"{verb}: {state}", wrong))
    parts.append(table("Not made by PEFT itself on the class chosen here", rows(NOT_MADE, "merge")))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--only", default="", help="a pattern that a configuration's text holds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: list[tuple[Case, dict[str, str]]] = []
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments.tests):
            if not re.search(arguments.only, str(case)):
                continue
            base, work = Path(folder) / case.model.replace(" ", "-"), Path(folder) / "work"
            if case.model not in made:
                made[case.model] = make(case.model, base)
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                found = run(case, base, made[case.model], work)
            shutil.rmtree(work, ignore_errors=True)
            results.append((case, found))
            print(f"{time.monotonic() - start:.1f}s {case}\n    {found}", flush=True)
    (arguments.output or Path("/dev/stdout")).write_text(page(results))
    bad = (DIFFERENT, TRACEBACK)
    return int(any(text.startswith(bad) for _, found in results for text in found.values()))


if __name__ == "__main__":
    sys.exit(main())
