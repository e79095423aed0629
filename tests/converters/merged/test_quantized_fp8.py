"""Merging into bases of float8 weights with scales beside them. The truth is what transformers
loads of them where it can do that without a GPU, else the formula in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from converters.errors import BaseError
from converters.model.base import open_base
from dora_serve.api import merge
from tests.converters.made import WEIGHTS
from tests.converters.quantized import (
    adapter,
    changed_base,
    experts_base,
    fails_on,
    live_logits,
    merged_logits,
    packed_base,
    plain_base,
    prove,
    proves,
)

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.0.mlp.down_proj.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
LARGEST = 448.0


def by_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in float8 and the scale of each block; the last blocks may be smaller."""
    out, inn = weight.shape
    scale = torch.empty(-(-out // rows), -(-inn // columns))
    packed = torch.empty(out, inn, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[part].float().abs().max() / LARGEST
            packed[part] = (weight[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return packed, scale


def expanded(scale: torch.Tensor, like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    full = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return full[: like.shape[0], : like.shape[1]]


def pack(plain: Path, rows: int, columns: int, ending: str = "_scale_inv") -> Tensors:
    found: Tensors = {}
    for name, weight in load_file(plain / WEIGHTS).items():
        found[name] = weight
        if name.endswith("_proj.weight"):
            found[name], found[name + ending] = by_blocks(weight, rows, columns)
    return found


def by_hand(tensors: Tensors, rows: int, columns: int, ending: str = "_scale_inv") -> Tensors:
    """The formula, in float64."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = expanded(tensors[name + ending].double(), tensor, rows, columns)
            found[name] = (tensor.double() * scale).float()
        elif not name.endswith(ending):
            found[name] = tensor.float()
    return found


def loaded(base: Path) -> Tensors:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return adapter(plain_base(tmp_path / "plain"), tmp_path / "run")


@proves("fp8: blocks")
def test_blocks(run: Path, tmp_path: Path) -> None:
    tensors = pack(tmp_path / "plain", 32, 64)
    said = {**FP8, "weight_block_size": [32, 64]}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, said)
    prove(run, base, tmp_path / "out", loaded(base), "transformers (fp8)")
    difference = live_logits(base, run) - merged_logits(tmp_path / "out" / "float32")
    assert float(difference.abs().max()) < 2e-6
    scale = tensors[f"{DOWN}_scale_inv"].clone()
    scale[1] *= 1.5
    other = changed_base(base, tmp_path / "other", f"{DOWN}_scale_inv", scale)
    fails_on(run, tmp_path / "out" / "float32", other)


def test_the_last_blocks_are_smaller(run: Path, tmp_path: Path) -> None:
    """As in DeepSeek's attention: 576 rows are four and a half blocks of 128."""
    tensors = pack(tmp_path / "plain", 48, 48)
    said = {**FP8, "weight_block_size": [48, 48]}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, said)
    prove(run, base, tmp_path / "out", by_hand(tensors, 48, 48), "this tool")


@proves("fp8: one scale")
def test_one_scale_for_all_and_those_of_activations(run: Path, tmp_path: Path) -> None:
    """As Mistral ships it."""
    tensors = pack(tmp_path / "plain", 1000, 1000)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = tensors[name].reshape(())
        tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.5)
    said = {**FP8, "activation_scheme": "static", "weight_block_size": None}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, said)
    expected = by_hand(
        {n: t.view(1, 1) if t.dim() == 0 else t for n, t in tensors.items()}, 1000, 1000
    )
    truth = {n: t for n, t in expected.items() if not n.endswith("activation_scale")}
    prove(run, base, tmp_path / "out", truth, "transformers (fp8)")


@proves("fbgemm_fp8: rows")
def test_rows(run: Path, tmp_path: Path) -> None:
    """As fbgemm writes it, which computes on a GPU only."""
    tensors = pack(tmp_path / "plain", 1, 1000, "_scale")
    truth = by_hand(tensors, 1, 1000, "_scale")
    for name in list(tensors):
        if name.endswith("_scale"):
            tensors[name.replace("weight_scale", "input_scale_ub")] = torch.tensor([1200.0])
    said = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, said)
    found = prove(run, base, tmp_path / "out", truth, "this tool")
    assert "requires a GPU" in str(found.dequantized)
    other = changed_base(base, tmp_path / "other", f"{DOWN}_scale", tensors[f"{DOWN}_scale"] * 2)
    fails_on(run, tmp_path / "out" / "float32", other)


def test_experts(tmp_path: Path) -> None:
    """On disk one by one, in memory fused."""
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    experts_base("Qwen3Moe", tmp_path / "plain", num_experts=4, bos_token_id=2, **sizes)
    run = adapter(
        tmp_path / "plain",
        tmp_path / "run",
        ["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    tensors = pack(tmp_path / "plain", 32, 64)
    assert "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv" in tensors
    said = {**FP8, "weight_block_size": [32, 64]}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, said)
    merge(run, tmp_path / "out", base=base, dtype="float32")
    assert (
        load_file(tmp_path / "out" / WEIGHTS).keys()
        == load_file(tmp_path / "plain" / WEIGHTS).keys()
    )
    live = live_logits(base, run)
    assert float((live - merged_logits(tmp_path / "out")).abs().max()) < 2e-6
    assert float((live - live_logits(tmp_path / "plain", run)).abs().max()) > 1e-3


def _without(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if n != f"{DOWN}_scale_inv"}


def _narrow(tensors: Tensors) -> Tensors:
    return {**tensors, f"{DOWN}_scale_inv": torch.ones(7, 3)}


def _infinite(tensors: Tensors) -> Tensors:
    return {**tensors, f"{DOWN}_scale_inv": tensors[f"{DOWN}_scale_inv"] / 0}


def _cut(tensors: Tensors) -> Tensors:
    """One scale for all rows of a column of blocks, which only those of the first have."""
    return {**tensors, f"{DOWN}_scale_inv": tensors[f"{DOWN}_scale_inv"][:1].clone()}


def _longer(tensors: Tensors) -> Tensors:
    return {**tensors, f"{DOWN}_scale_inv": tensors[f"{DOWN}_scale_inv"].repeat(2, 1)}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without, "lacks a part"),
        (_narrow, "not fit"),
        (_infinite, "finite"),
        (_cut, "not fit"),
        (_longer, "not fit"),
    ],
)
def test_damaged_scales(
    damage: Callable[[Tensors], Tensors], said: str, run: Path, tmp_path: Path
) -> None:
    tensors = damage(pack(tmp_path / "plain", 32, 64))
    told = {**FP8, "weight_block_size": [32, 64]}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, told)
    with pytest.raises(BaseError, match=said):
        merge(run, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_another_way_to_quantize(run: Path, tmp_path: Path) -> None:
    tensors = pack(tmp_path / "plain", 32, 64)
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, {"quant_method": "hqq"})
    with pytest.raises(BaseError, match="quantized") as caught:
        merge(run, tmp_path / "out", base=base)
    assert "hqq" in str(caught.value) and "bitsandbytes" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert open_base(base).dtype() == torch.bfloat16


def test_smaller_last_blocks_whose_number_divides_the_rows(run: Path, tmp_path: Path) -> None:
    """128 rows in blocks of 96 are two of 64 to transformers; 960, as in SmolLM2, in blocks of 128
    are eight of 120."""
    tensors = pack(tmp_path / "plain", 96, 64)
    said = {**FP8, "weight_block_size": [96, 64]}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, said)
    found = prove(run, base, tmp_path / "out", by_hand(tensors, 96, 64), "this tool")
    assert "the last are smaller" in str(found.dequantized)


def test_scales_that_transformers_leaves_out(run: Path, tmp_path: Path) -> None:
    """`weight_scale`, as AutoFP8 wrote it, beside what `fp8` is to transformers."""
    tensors = pack(tmp_path / "plain", 1000, 1000, "_scale")
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, {**FP8})
    prove(run, base, tmp_path / "out", by_hand(tensors, 1000, 1000, "_scale"), "this tool")


def test_blocks_of_the_usual_size_that_nobody_says(tmp_path: Path) -> None:
    plain = plain_base(tmp_path / "plain", intermediate_size=130)
    tensors = pack(plain, 128, 128)
    base = packed_base(plain, tmp_path / "base", tensors, FP8)
    expected = by_hand(tensors, 128, 128)[DOWN]
    assert torch.equal(open_base(base).tensors[DOWN].load(), expected)


def test_experts_of_four_bits(tmp_path: Path) -> None:
    """DeepSeek V4: two E2M1 values a byte, beside float8. transformers' own conversion is the
    truth."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 64}
    plain = experts_base("Qwen3Moe", tmp_path / "plain", **sizes)
    run = adapter(plain, tmp_path / "run", ["q_proj"])
    stored, truth, draw = pack(plain, 128, 128, ".scale"), {}, torch.Generator().manual_seed(5)
    for name, weight in load_file(plain / WEIGHTS).items():
        truth[name] = weight.float()
        if name not in stored or f"{name}.scale" not in stored:
            continue
        scale = stored.pop(f"{name}.scale")
        if ".experts." in name:
            out, inn = weight.shape
            data = torch.randint(0, 256, (out, inn // 2), generator=draw, dtype=torch.uint8)
            stored[name] = data.view(torch.int8)
            scale = torch.randint(118, 122, (out, inn // 32), generator=draw, dtype=torch.uint8)
            scale = scale.view(torch.float8_e8m0fnu)
        stored[f"{name.removesuffix('.weight')}.scale"] = scale
        made = Fp8Dequantize(None)._dequantize_one(stored[name], scale, torch.float32)
        truth[name] = made
    base = packed_base(plain, tmp_path / "base", stored, FP8 | {"weight_block_size": [128, 128]})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "expert_dtype": "fp4"}))
    merge(run, tmp_path / "out", base=base, dtype="float32")
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert merged.keys() == truth.keys()
    same = {name for name, tensor in merged.items() if torch.equal(tensor, truth[name])}
    assert truth.keys() - same == {"model.layers.0.self_attn.q_proj.weight"}
    assert "expert_dtype" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e8m0fnu])
def test_what_stays_packed_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = plain_base(tmp_path / "plain")
    run = adapter(plain, tmp_path / "run", ["q_proj"])
    stored = pack(plain, 32, 64)
    del stored[DOWN + "_scale_inv"]
    stored[DOWN] = torch.ones_like(stored[DOWN], dtype=torch.uint8).view(dtype)
    base = packed_base(plain, tmp_path / "base", stored, FP8 | {"weight_block_size": [32, 64]})
    with pytest.raises(BaseError, match=r"lacks a part|variant"):
        merge(run, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
