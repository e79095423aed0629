"""Runs in parts (DLoRA): joined, they equal PEFT's live model of the adapter that was split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from converters.readers import ReadOptions
from dora_serve import DoraExportError, merge, read_run, verify, write_adapter
from dora_serve.commands import dora_export
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import DATA, randomize

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
PLACES = {
    "cloud": ("layers.0", "lm_head"),
    "phone": ("layers.1.mlp",),
    "tablet": ("layers.1.self",),
}

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def whole(llama_base: Path, tmp_path: Path) -> Path:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"v_proj": 2},
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
    randomize(model, ("lora_", "modules_to_save"))
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def split(whole: Path, out: Path) -> list[Path]:
    """The adapter in three folders, each with some of the modules."""
    tensors = load_file(whole / WEIGHTS)
    config = json.loads((whole / CONFIG).read_text())
    parts = []
    for place, words in PLACES.items():
        own = {name: t for name, t in tensors.items() if any(word in name for word in words)}
        parts.append(write(out / place, own, config))
    assert sum(len(load_file(part / WEIGHTS)) for part in parts) == len(tensors)
    return parts


def as_files(parts: list[Path]) -> list[Path]:
    """The same with the second and third part as files in the first one's folder."""
    files = [parts[0] / f"{part.name}.safetensors" for part in parts[1:]]
    for part, file in zip(parts[1:], files, strict=True):
        (part / WEIGHTS).rename(file)
    return [parts[0], *files]


@pytest.mark.supports(method="dlora", family="llama", targets=("merged", "peft"))
@pytest.mark.parametrize("files", [False, True])
def test_parts_equal_pefts_live_model_of_the_whole(
    tmp_path: Path, llama_base: Path, whole: Path, files: bool
) -> None:
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_base), str(whole))
    inputs = verification_batch(live)
    truth = logits(live.eval(), inputs)
    parts = split(whole, tmp_path)
    parts = as_files(parts) if files else parts
    run = read_run(parts[0], ReadOptions(parts=tuple(parts[1:])))
    alone = read_run(whole)
    assert run.method == "peft_lora" and run.task == "causal-lm"
    assert set(run.updates) == set(alone.updates) and run.start_rank == alone.start_rank
    assert {file.name for file in run.files} >= {(parts[1] if files else whole / WEIGHTS).name}

    def distance(path: Path, adapter: bool) -> float:
        model = LlamaForCausalLM.from_pretrained(llama_base if adapter else path)
        found = PeftModel.from_pretrained(model, str(path)) if adapter else model
        return float((logits(found.eval(), inputs) - truth).abs().max())

    merge(run, tmp_path / "out", base=llama_base)
    write_adapter(run, tmp_path / "adapter", base=llama_base)
    assert distance(tmp_path / "out", False) <= 1e-4
    assert distance(tmp_path / "adapter", True) <= 1e-4
    assert verify(run, tmp_path / "out", llama_base).passed
    # The control: one part left out.
    fewer = read_run(parts[0], ReadOptions(parts=(parts[1],)))
    merge(fewer, tmp_path / "fewer", base=llama_base)
    assert distance(tmp_path / "fewer", False) > 1e-2


def test_the_command_takes_parts(tmp_path: Path, llama_base: Path, whole: Path) -> None:
    first, second, third = (str(part) for part in split(whole, tmp_path))
    command = ["merge", first, str(tmp_path / "out"), "--base", str(llama_base)]
    result = CliRunner().invoke(dora_export, [*command, "--part", second, "--part", third])
    assert result.exit_code == 0, result.output
    merge(whole, tmp_path / "whole-out", base=llama_base)
    joined, alone = (
        load_file(tmp_path / out / "model.safetensors") for out in ("out", "whole-out")
    )
    assert all(torch.equal(joined[name], alone[name]) for name in alone)


def test_parts_of_two_methods(tmp_path: Path, llama_base: Path) -> None:
    def make(name: str, target: str, use_dora: bool) -> Path:
        config = LoraConfig(r=3, target_modules=[target], use_dora=use_dora, task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
        randomize(model)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    lora, dora = make("lora", "q_proj", False), make("dora", "up_proj", True)
    model: Any = LlamaForCausalLM.from_pretrained(llama_base)
    for part in (lora, dora):
        model = PeftModel.from_pretrained(model, str(part)).merge_and_unload()
    inputs = verification_batch(model)
    run = read_run(lora, ReadOptions(parts=(dora,)))
    assert run.method == "peft_lora + peft_dora"
    merge(run, tmp_path / "out", base=llama_base)
    found = logits(LlamaForCausalLM.from_pretrained(tmp_path / "out").eval(), inputs)
    assert float((found - logits(model.eval(), inputs)).abs().max()) <= 1e-4
    # The same magnitudes twice are counted once.
    twice = read_run(lora, ReadOptions(parts=(dora, dora)))
    assert set(twice.updates) == set(run.updates) and twice.method == run.method


def overlap(folder: Path, whole: Path, change: float, name: str, **config: Any) -> Path:
    """A part that repeats what the first one has, `change` added to tensor `name`."""
    tensors = {
        n: t for n, t in load_file(whole / WEIGHTS).items() if "layers.0" in n or "head" in n
    }
    tensors[name] += change
    return write(folder, tensors, {**json.loads((whole / CONFIG).read_text()), **config})


def test_the_same_module_twice_counts_once(tmp_path: Path, llama_base: Path, whole: Path) -> None:
    parts = split(whole, tmp_path)
    again = overlap(tmp_path / "again", whole, 0, f"{QUERY}.lora_A.weight")
    run = read_run(parts[0], ReadOptions(parts=(*parts[1:], again)))
    merge(run, tmp_path / "out", base=llama_base)
    merge(whole, tmp_path / "whole-out", base=llama_base)
    left, right = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "whole-out"))
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (f"{QUERY}.lora_A.weight", {}, r"module is in two parts[^$]*layers\.0\.self_attn\.q_proj"),
        ("base_model.model.lm_head.weight", {}, "tensor is in two parts"),
        (f"{QUERY}.lora_A.weight", {"lora_alpha": 7}, "module is in two parts"),
        (None, {"base_model_name_or_path": "another/model"}, "another base model"),
        (None, {"task_type": "SEQ_CLS"}, "another task"),
    ],
)
def test_parts_that_do_not_belong_together(
    tmp_path: Path, whole: Path, name: str | None, config: dict[str, Any], message: str
) -> None:
    parts = split(whole, tmp_path)
    change = 0 if name is None or config else 1
    other = overlap(tmp_path / "other", whole, change, name or f"{QUERY}.lora_A.weight", **config)
    with pytest.raises(DoraExportError, match=message):
        read_run(parts[0], ReadOptions(parts=(other,)))


def test_bad_parts(tmp_path: Path, whole: Path) -> None:
    first, second, _ = split(whole, tmp_path)

    def fails(part: Path, message: str) -> None:
        with pytest.raises(DoraExportError, match=message):
            read_run(first, ReadOptions(parts=(part,)))

    fails(tmp_path / "nowhere", "no such part")
    (second / CONFIG).unlink()
    fails(second / WEIGHTS, "needs the configuration")
    fails(second, "no run found")
    save_file({}, first / "empty.safetensors")
    fails(first / "empty.safetensors", "adapted nothing")
    weight = {f"{QUERY}.weight": torch.zeros(32, 32)}
    config = json.loads((whole / CONFIG).read_text())
    fails(write(tmp_path / "full", weight, config), "adapts what another replaces")
    dora_run = DATA / "reference" / "runs" / "Checkpoint" / "Roberta_Base"
    checkpoint = next(iter(sorted(dora_run.rglob("checkpoint"))))
    fails(checkpoint, "whole model in it")
