"""Runs of many methods as one target: number, configuration and weights of a run as one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from converters.files.tensors import open_file
from dora_serve import ReadOptions, read_run
from tests.fuzz.mutate import SPLIT

DATA = Path(__file__).parent.parent / "data"
RUNS = DATA / "methods"
_LARGEST = 1 << 20  # elements of an update that is computed

# Each run, its base, and what it does not tell itself.
_LLAMA, _ROBERTA = "reference/bases/llama", "reference/bases/roberta"
_RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("bayesian_lora/scale", _ROBERTA, {}),
    ("bayesian_lora/range", _ROBERTA, {}),
    ("bayeslora/llama", _LLAMA, {"lora_alpha": 12.0, "start_rank": 6}),
    ("mora/llama-type1", "methods/mora/llama", {}),
    ("mora/llama-type6", "methods/mora/llama", {}),
    ("mora/gpt2-type4", "methods/mora/gpt2", {}),
    ("nvlabs_dora/llama-dora", "methods/nvlabs_dora/llama", {}),
    ("aflora_gsm8k/run", _LLAMA, {}),
    ("sora/run", _ROBERTA, {"lora_alpha": 16.0}),
    ("loralib_adalora/run", "methods/bases/deberta", {}),
    ("dylora/run", _ROBERTA, {"rank": 6}),
    ("increlora/run", _ROBERTA, {}),
]


def unpacked(raw: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def packed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def prepare_runs(folder: Path) -> list[bytes]:
    folder.mkdir(exist_ok=True)
    seeds = []
    for number, (name, *_) in enumerate(_RUNS):
        (config,) = (RUNS / name).glob("*config.json")
        (weights,) = (path for path in (RUNS / name).iterdir() if _weights(path))
        tensors = {name: tensor.load() for name, tensor in open_file(weights).items()}
        header, data = unpacked(save(tensors))
        text = {"run": number, "config": json.loads(config.read_text())}
        seeds.append(json.dumps({**text, "header": json.loads(header)}).encode() + SPLIT + data)
    return seeds


def _weights(path: Path) -> bool:
    return path.name.startswith(("adapter_model", "model", "pytorch_model"))


def read_one(folder: Path, data: bytes) -> None:
    text, _, rest = data.partition(SPLIT)
    try:
        parts = json.loads(text)
        name, base, more = _RUNS[parts["run"]]
        config, header = (json.dumps(parts[part]).encode() for part in ("config", "header"))
    except (ValueError, LookupError, TypeError, RecursionError):
        return  # not of this form: nothing of ours reads it
    (known,) = (RUNS / name).glob("*config.json")
    weights = "model.safetensors" if known.name == "config.json" else "adapter_model.safetensors"
    for old in folder.iterdir():
        old.unlink()
    (folder / known.name).write_bytes(config)
    (folder / weights).write_bytes(packed(header, rest))
    run = read_run(folder, ReadOptions(base=DATA / base, **more))
    for update in run.strip().updates.values():
        out, inn = update.shape
        if out * inn <= _LARGEST:
            update.merge(torch.zeros(out, inn), 0)
