"""Adapters of quantized bases in vLLM itself, whose kernels for them take no float32."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.readers import ReadOptions
from dora_serve import read_run, verify, write_adapter
from tests.converters.merged.test_quantized_ints import awq_base
from tests.converters.quantized import adapter, plain_base

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


def test_an_awq_base(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    plain = plain_base(tmp_path / "plain", torch.float16, **heads)
    base, _ = awq_base(plain, tmp_path / "base", zero_point=True)
    run = read_run(adapter(plain, tmp_path / "run"), ReadOptions(base=base))
    out = tmp_path / "adapter"
    write_adapter(run, out, base=base, target="vllm")
    right = verify(run, out, base, "vllm")
    assert right.passed and right.dtype == "float16", right

    file = out / "adapter_model.safetensors"
    save_file({n: t / 2 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    wrong = verify(run, out, base, "vllm", earlier=right)
    assert not wrong.passed and wrong.max_abs > 2 * wrong.tolerance
