"""What a clone without Git LFS leaves in the place of large files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dora_serve.commands import dora_export
from tests.conftest import MODELS

BASE = MODELS / "tiny-llama-base"
RUN = MODELS / "runs/Checkpoint/Tiny_Llama/Lora_Rank=8/Count_Down/Tiny_Llama--Count_Down--1"


def export(*arguments: object) -> Any:
    return CliRunner().invoke(dora_export, [*map(str, arguments)])


def point(file: Path) -> None:
    """Put the pointer in the place of `file`, as Git LFS writes it."""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    file.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_in_a_base_is_told(name: str, tmp_path: Path) -> None:
    """Weights were damaged, and a tokenizer went into the merge as the pointer that it was."""
    base = shutil.copytree(BASE, tmp_path / "base")
    point(base / name)
    for verb in ("merge", "onnx"):
        done = export(verb, RUN, tmp_path / "out", "--base", base)
        assert done.exit_code == 1
        assert "a Git LFS pointer" in done.output and "git lfs pull" in done.output
        assert str(base / name) in done.output.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_pointer_in_a_run_is_told(name: str, tmp_path: Path) -> None:
    export("adapter", RUN, tmp_path / "run")
    (tmp_path / "run/adapter_model.safetensors").rename(tmp_path / "run" / name)
    point(tmp_path / "run" / name)
    for verb in ("inspect", "lint"):
        done = export(verb, tmp_path / "run")
        assert done.exit_code == 1 and "a Git LFS pointer" in done.output
        assert "damaged" not in done.output
