"""A reader from another distribution: forty lines, and every command takes its runs."""

from __future__ import annotations

import json
import re
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions, RunFolder, is_number, is_run
from converters.readers.module import grouped
from converters.run import LazyUpdates, Run
from dora_serve import DoraExportError, merge, read_run, verify, write_adapter

CONFIG, WEIGHTS = "scaled_lora.json", "scaled_lora.safetensors"
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


class ScaledLoraReader:
    """ΔW = strength · high·diag(gain)·low; a method that exists here only."""

    name = "scaled_lora"
    looks_for = f"{CONFIG} and {WEIGHTS} with tensors .low, .high and .gain"

    def detect(self, folder: RunFolder) -> RunFolder | None:
        return folder if folder.has(CONFIG, WEIGHTS) else None

    def read(self, folder: RunFolder, options: ReadOptions) -> Run:  # noqa: ARG002
        strength = folder.json(CONFIG).get("strength")
        if not is_number(strength):
            raise DoraExportError("strength is not a number", found=strength)
        tensors = folder.tensors(WEIGHTS)
        pattern = re.compile(r"(.+)\.(low|high|gain)")
        modules, rest = grouped(tensors, pattern, {"low": "A", "high": "B"})
        for name in rest:
            raise DoraExportError("a tensor that is not read", file=folder.path, tensor=name)
        ranks = {}
        for name, module in modules.items():
            ranks[name] = module.pair(("low", "high"))
            module.need("gain", ranks[name], "low, high and gain")
        return Run(
            path=folder.path,
            method=self.name,
            updates=LazyUpdates(
                {n: partial(m.sum, strength, "gain") for n, m in modules.items()},
                {n: m.shape for n, m in modules.items()},
            ),
            start_rank=ranks,
            files=(folder.path / WEIGHTS, folder.path / CONFIG),
        )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = entry_points(group="dora_serve.readers")
    point = SimpleNamespace(name="scaled_lora", load=lambda: ScaledLoraReader)
    monkeypatch.setattr("converters.readers.registry.entry_points", lambda **_: [*ours, point])


@pytest.fixture
def run(tmp_path: Path, llama_base: Path) -> Path:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    weights = load_file(llama_base / "model.safetensors")
    for name in NAMES:
        out, inn = weights[f"{name}.weight"].shape
        gain = torch.tensor([1.5, 0.0, -2.0])
        tensors |= {f"{name}.low": torch.randn(3, inn), f"{name}.high": torch.randn(out, 3)}
        tensors[f"{name}.gain"] = gain
    (tmp_path / "run").mkdir()
    save_file(tensors, tmp_path / "run" / WEIGHTS)
    (tmp_path / "run" / CONFIG).write_text(json.dumps({"strength": 0.05}))
    return tmp_path / "run"


@pytest.mark.usefixtures("installed")
def test_a_strangers_run_is_merged_exactly_and_proved(
    tmp_path: Path, llama_base: Path, run: Path
) -> None:
    assert is_run(run) and not is_run(llama_base)
    read = read_run(run)
    assert read.method == "scaled_lora"
    assert dict(read.strip().ranks) == dict.fromkeys(NAMES, 2)
    merge(read, tmp_path / "merged", base=llama_base)
    write_adapter(read, tmp_path / "adapter", base=llama_base)
    before, merged, own = (
        load_file(file)
        for file in (
            llama_base / "model.safetensors",
            tmp_path / "merged" / "model.safetensors",
            run / WEIGHTS,
        )
    )
    for name in NAMES:
        low, high, gain = (own[f"{name}.{part}"].double() for part in ("low", "high", "gain"))
        expected = before[f"{name}.weight"].double() + 0.05 * (high * gain) @ low
        found = merged[f"{name}.weight"].double()
        assert float((found - expected).norm() / expected.norm()) <= 1e-6
        assert float((before[f"{name}.weight"].double() - expected).norm()) > 1e-2
    for out in ("merged", "adapter"):
        assert verify(read, tmp_path / out, base=llama_base).passed


@pytest.mark.usefixtures("installed")
def test_a_broken_module_is_told(run: Path) -> None:
    tensors = load_file(run / WEIGHTS)
    del tensors[f"{NAMES[0]}.gain"]
    save_file(tensors, run / WEIGHTS)
    with pytest.raises(DoraExportError, match="incomplete"):
        read_run(run)


def test_without_the_reader_it_is_no_run(run: Path) -> None:
    assert not is_run(run)
    with pytest.raises(DoraExportError, match="no run found"):
        read_run(run)
