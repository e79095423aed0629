"""Merging into gpt-oss as it is published: experts in MXFP4. The truth is what transformers
dequantizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from converters.errors import BaseError
from converters.model.base import open_base
from converters.readers import ReadOptions, read_run
from dora_serve.api import merge, write_adapter
from dora_serve.proof.verify import verify
from tests.converters.made import WEIGHTS
from tests.converters.quantized import (
    adapter,
    changed_base,
    fails_on,
    gpt_oss_base,
    logits,
    merged_logits,
    packed_base,
)

EXPERTS = "model.layers.0.mlp.experts"
SAID = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[E, in, out]` → blocks and scales, of 32 along `in`."""
    experts, inn, out = weight.shape
    values = weight.float().transpose(1, 2).reshape(experts, out, inn // 32, 32)
    power = torch.floor(torch.log2(values.abs().amax(-1) / 6)) + 1
    scaled = values / power.exp2()[..., None]
    code = (scaled.abs()[..., None] - LEVELS).abs().argmin(-1) + 8 * (scaled < 0)
    code = code.to(torch.uint8)
    return code[..., ::2] | code[..., 1::2] << 4, (power + 127).to(torch.uint8)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    gpt_oss_base(tmp_path / "plain", sliding_window=8)
    tensors = load_file(tmp_path / "plain" / WEIGHTS)
    for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(tensors.pop(name))
    return packed_base(tmp_path / "plain", tmp_path / "base", tensors, SAID)


def live_model(base: Path) -> transformers.PreTrainedModel:
    """Its experts, which transformers leaves in bfloat16, in float32 like the rest."""
    model = transformers.GptOssForCausalLM.from_pretrained(
        base,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.float32,
    )
    return model.float().eval()


def test_its_tensors(base: Path) -> None:
    truth = live_model(base).state_dict()
    opened = open_base(base)
    assert opened.tensors.keys() == truth.keys() and opened.dtype() == torch.bfloat16
    for name, tensor in opened.tensors.items():
        assert torch.equal(tensor.load().float(), truth[name]), name
    part = torch.empty(777)
    name = f"{EXPERTS}.gate_up_proj"
    opened.tensors[name].read_into(part, 4000)
    assert torch.equal(part, truth[name].flatten()[4000:4777])


@pytest.mark.supports(method="peft_lora", family="gpt-oss", base="mxfp4", targets=("merged",))
@pytest.mark.parametrize("experts", [True, False])
def test_what_was_trained(experts: bool, base: Path, tmp_path: Path) -> None:
    """With an update on the experts, and with them frozen."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    run = adapter(tmp_path / "plain", tmp_path / "run", ["q_proj"], target_parameters=parameters)
    merge(run, tmp_path / "float32", base=base, dtype="float32")
    live = logits(PeftModel.from_pretrained(live_model(base), run).eval())
    assert float((live - merged_logits(tmp_path / "float32")).abs().max()) < 2e-6
    assert float((live - logits(live_model(base))).abs().max()) > 1e-3
    merge(run, tmp_path / "out", base=base)
    wide, narrow = (load_file(tmp_path / name / WEIGHTS) for name in ("float32", "out"))
    assert narrow.keys() == load_file(tmp_path / "plain" / WEIGHTS).keys()
    assert all(torch.equal(narrow[n], wide[n].to(torch.bfloat16)) for n in wide)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    found = verify(read_run(run, ReadOptions(base=base)), tmp_path / "out", base)
    assert found.passed and found.dequantized == "transformers (mxfp4)", found


def test_another_scale_is_another_base(base: Path, tmp_path: Path) -> None:
    run = adapter(tmp_path / "plain", tmp_path / "run", ["q_proj"])
    merge(run, tmp_path / "out", base=base, dtype="float32")
    name = f"{EXPERTS}.down_proj_scales"
    other = changed_base(base, tmp_path / "other", name, load_file(base / WEIGHTS)[name] + 1)
    fails_on(run, tmp_path / "out", other)


def test_damaged_scales(base: Path, tmp_path: Path) -> None:
    run = adapter(tmp_path / "plain", tmp_path / "run", ["q_proj"])
    name = f"{EXPERTS}.down_proj_scales"
    scales = load_file(base / WEIGHTS)[name]
    other = changed_base(base, tmp_path / "other", name, scales[:, :-1].contiguous())
    with pytest.raises(BaseError, match="another shape"):
        merge(run, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()
    write_adapter(run, tmp_path / "adapter", base=other, target="vllm")


def test_the_dtype_of_the_configuration_is_that_of_all(base: Path, tmp_path: Path) -> None:
    run = adapter(tmp_path / "plain", tmp_path / "run", ["q_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    merge(run, tmp_path / "out", base=base)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float32}
    found = verify(read_run(run, ReadOptions(base=base)), tmp_path / "out", base)
    assert found.passed and found.dtype == "float32", found
