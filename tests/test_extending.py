"""A reader and targets from another distribution, as docs/extending.md shows them, installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.processes import commands

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
STRENGTH, RANK = 0.05, 4
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}


def page_files() -> dict[str, str]:
    """The files that the page shows, each named in the line before it."""
    block = re.compile(r"`([\w.]+)`:\n\n```(?:python|toml)\n(.*?)```", re.DOTALL)
    return dict(block.findall(PAGE.read_text()))


class Installed:
    """dora-export where the page's distribution is installed, in a folder of its own."""

    def __init__(self, site: Path, run: Path, base: Path) -> None:
        self.site, self.run, self.base = site, run, base

    def __call__(self, *words: object, code: int = 0, site: bool = True) -> Any:
        environment = {**os.environ, "PYTHONPATH": str(self.site if site else "")}
        done = subprocess.run(
            [str(commands() / "dora-export"), *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout) if "--json" in words else done.stdout + done.stderr


@pytest.fixture(scope="module")
def stranger(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("stranger")
    (root / "source").mkdir()
    files = page_files()
    assert files.keys() == {"pyproject.toml", "scaled_lora.py", "npz_target.py"}
    for name, text in files.items():
        (root / "source" / name).write_text(text)
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    where = ["--no-deps", "--no-build-isolation", "--target", str(root / "site")]
    subprocess.run([sys.executable, *pip, *where, str(root / "source")], check=True)
    run = root / "run"
    run.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for kind, (out, inn) in SHAPES.items():
            module = f"model.layers.{layer}.{kind}"
            tensors[f"{module}.low"] = torch.randn(RANK, inn, generator=generator)
            tensors[f"{module}.high"] = torch.randn(out, RANK, generator=generator)
            tensors[f"{module}.gain"] = torch.tensor([1.0, 0.0, -2.0, 0.5])
    save_file(tensors, run / "scaled_lora.safetensors")
    (run / "scaled_lora.json").write_text(json.dumps({"strength": STRENGTH}))
    return Installed(root / "site", run, llama_base)


def test_inspect_knows_the_method_and_the_targets(stranger: Installed) -> None:
    told = stranger("inspect", stranger.run, "--base", stranger.base, "--json")
    assert told["method"] == "scaled_lora"
    assert set(told["ranks"].values()) == {RANK - 1}
    assert told["targets"]["npz"].startswith("yes") and told["targets"]["tinyserve"] != ""
    assert "no run found" in stranger("inspect", stranger.run, code=1, site=False)


def test_its_target_plans_writes_and_is_proved(stranger: Installed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("export", stranger.run, out, "--target", "npz", "--base", stranger.base)
    planned = stranger(*words, "--dry-run", "--json")
    assert not out.exists()
    told = stranger(*words, "--json")
    assert told == {**planned, "written": True}
    arrays = np.load(out / "out.npz")
    assert len(arrays.files) == 2 * 2 * len(SHAPES)
    assert planned["bytes"] == sum(arrays[name].nbytes for name in arrays.files)
    certificate = json.loads((out / "dora_export.json").read_text())
    assert certificate["target"] == "npz" and certificate["run"]["method"] == "scaled_lora"
    proof = stranger("verify", stranger.run, out, "--base", stranger.base, "--json")
    assert proof["passed"] and proof["engine"] == "numpy" and proof["control"] > 1e-2
    # the control: an archive of half the update
    halved = {name: arrays[name] / (2 if name.endswith(".A") else 1) for name in arrays.files}
    np.savez(out / "out.npz", **halved)
    stranger("verify", stranger.run, out, "--base", stranger.base, code=1)
    refused = stranger(*words[:3], "--target", "npz", "--force", code=2, site=False)
    assert "npz" in refused


def test_its_options_are_flags_and_its_refusals_are_told(
    stranger: Installed, tmp_path: Path
) -> None:
    assert "[float32|float16]" in stranger("export", "--target", "npz", "--help")
    out = tmp_path / "half"
    words = ("adapter", stranger.run, out, "--target", "npz", "--base", stranger.base)
    half = stranger(*words, "--dtype", "float16", "--max-rank", 2, "--json")
    full = stranger(*words, "--dry-run", "--force", "--json")
    assert half["bytes"] * 3 == full["bytes"]
    assert "approximated" in half["warnings"][0]
    proof = stranger("verify", stranger.run, out, "--base", stranger.base, "--json")
    assert proof["passed"] and proof["fit"] == {"max_rank": 2} and proof["unfitted"] > 1e-2
    stranger(*words, "--dtype", "bfloat16", code=2)
    for more in ((), ("--dry-run",)):
        assert "not empty" in stranger(*words, *more, code=1)


def test_our_targets_take_its_runs(stranger: Installed, tmp_path: Path) -> None:
    for verb, out in (("merge", tmp_path / "merged"), ("adapter", tmp_path / "adapter")):
        stranger(verb, stranger.run, out, "--base", stranger.base)
        proof = stranger("verify", stranger.run, out, "--base", stranger.base, "--json")
        assert proof["passed"] and proof["control"] > 1e-2


def test_an_engine_of_a_profile_is_written_for_and_linted(
    stranger: Installed, tmp_path: Path
) -> None:
    for target in ("tinyserve", "peft"):
        out = tmp_path / target
        stranger("adapter", stranger.run, out, "--target", target, "--base", stranger.base)
        told = stranger("lint", out, "--target", "tinyserve", "--base", stranger.base, "--json")
        assert told["engines"] == {"tinyserve": "ok"}
    config = tmp_path / "peft" / "adapter_config.json"
    pattern = {"^model.layers.0.self_attn.q_proj": 1}  # which this engine does not read
    config.write_text(json.dumps({**json.loads(config.read_text()), "alpha_pattern": pattern}))
    stranger("lint", tmp_path / "peft", "--target", "tinyserve", code=1)
