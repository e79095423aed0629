"""Adapters on experts in vLLM's classes, as its kernels on a GPU compute them or leave them out
(`tests/engines/vllm/test_vllm_gpu.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converters.lint import lint
from converters.model.base import open_base
from converters.targets.lora_folder import CONFIG, WEIGHTS
from tests.converters.families import PARAMETERS, save_base
from tests.converters.quantized import adapter, gpt_oss_base


def errors(lora: Path, base: Path) -> set[str]:
    return {f.check for f in lint(lora, open_base(base), ["vllm"]) if f.severity == "error"}


@pytest.mark.parametrize(("block", "found"), [("block_sparse_moe", set()), ("mlp", {"experts"})])
def test_mixtral_by_its_names_in_the_engine(tmp_path: Path, block: str, found: set[str]) -> None:
    save_base("mixtral", tmp_path / "base")
    tensors = {}
    for expert in range(4):
        for kind, (rows, columns) in {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}.items():
            name = f"base_model.model.model.layers.0.{block}.experts.{expert}.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.ones(2, columns)
            tensors[f"{name}.lora_B.weight"] = torch.ones(rows, 2)
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(tensors, lora / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1", "w2", "w3"]}
    (lora / CONFIG).write_text(json.dumps(config))
    assert errors(lora, tmp_path / "base") & {"experts"} == found


@pytest.mark.parametrize("count", [1, 2])
def test_gpt_oss_as_peft_saves_it(tmp_path: Path, count: int) -> None:
    base = gpt_oss_base(tmp_path / "base")
    parameters = PARAMETERS["target_parameters"][:count]
    lora = adapter(base, tmp_path / "lora", ["q_proj"], target_parameters=parameters)
    assert errors(lora, base) == (set() if count == 2 else {"target_parameters"})
