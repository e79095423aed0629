"""A server's base, in whose place another one comes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.model.base import open_base
from dora_serve.vllm.desired import Following


@pytest.fixture
def root(
    tmp_path: Path, llama_base: Path, llama_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.setenv("DORA_SERVE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(llama_base, tmp_path / "root" / "base")
    shutil.copytree(llama_lora, tmp_path / "root" / "run")
    return tmp_path / "root"


def test_a_base_that_is_another_by_now_takes_no_run(root: Path, llama_lora: Path) -> None:
    """What is served of the first one goes on; a base that is only copied anew is the same one."""
    weights = root / "base" / "model.safetensors"
    before = weights.read_bytes()
    following = Following(root, server=open_base(root / "base"), given=open_base(root / "base"))
    assert set(following.at_rest().adapters) == {"run"}
    put(weights, before)
    shutil.copytree(llama_lora, root / "same")
    assert set(following.at_rest().adapters) == {"run", "same"}
    tensors = {name: torch.ones_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, root / "ones", metadata={"format": "pt"})
    (root / "ones").replace(weights)
    shutil.copytree(llama_lora, root / "later")
    found = following.at_rest()
    assert set(found.adapters) == {"run", "same"}
    assert "no longer the one that is served" in found.problems["later"]
    put(weights, before)
    assert set(following.at_rest().adapters) == {"run", "same", "later"}


def test_a_base_written_over_with_its_date_kept(root: Path, llama_lora: Path) -> None:
    """As `cp -p` and archives do, where all files have one date."""
    weights = root / "base" / "model.safetensors"
    before = weights.stat()
    following = Following(root, server=open_base(root / "base"), given=open_base(root / "base"))
    assert set(following.at_rest().adapters) == {"run"}
    tensors = {name: torch.ones_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, root / "ones", metadata={"format": "pt"})
    assert (root / "ones").stat().st_size == before.st_size
    weights.write_bytes((root / "ones").read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.copytree(llama_lora, root / "later")
    found = following.at_rest()
    assert set(found.adapters) == {"run"}
    assert "no longer the one that is served" in found.problems["later"]


def put(file: Path, content: bytes) -> None:
    new = file.with_name("new")
    new.write_bytes(content)
    new.replace(file)
