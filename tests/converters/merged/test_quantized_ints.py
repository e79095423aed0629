"""Merging into bases that GPTQ and AWQ quantized. Their libraries need a GPU or a compiler, so the
packing here is written by the formats' own description, number by number, and the truth is the
formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converters.errors import BaseError
from converters.model.base import open_base
from dora_serve.api import merge, write_adapter
from tests.converters.made import WEIGHTS
from tests.converters.quantized import (
    adapter,
    changed_base,
    fails_on,
    merged_logits,
    packed_base,
    plain_base,
    prove,
    proves,
    proving,
)

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.0.mlp.down_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that lies at each nibble


def stream(values: list[int], bits: int) -> list[int]:
    """Numbers as a little-endian stream of bits, in signed 32-bit words."""
    whole = sum(value << (bits * place) for place, value in enumerate(values))
    words = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(len(values) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def grouped(
    weight: torch.Tensor, bits: int, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[in, out]` → numbers, zeros and scales, of the groups in `index`; zeros from 1 on, as the
    first format of GPTQ can store them."""
    inn, out = weight.shape
    most, groups = (1 << bits) - 1, int(index.max()) + 1
    values = torch.empty(inn, out, dtype=torch.long)
    zeros = torch.empty(groups, out, dtype=torch.long)
    scales = torch.empty(groups, out, dtype=torch.float16)
    for group in range(groups):
        rows = weight[index == group].double()
        low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
        scales[group] = ((high - low) / most).half()
        zeros[group] = (-low / scales[group].double()).round().clamp(1, most)
        around = (rows / scales[group].double()).round() + zeros[group]
        values[index == group] = around.clamp(0, most).long()
    return values, zeros, scales


def pack_gptq(weight: torch.Tensor, bits: int, index: torch.Tensor, less: int) -> Tensors:
    values, zeros, scales = grouped(weight.T, bits, index)
    qweight = [stream(column, bits) for column in values.T.tolist()]
    qzeros = [stream([(z - less) % (1 << bits) for z in row], bits) for row in zeros.tolist()]
    return {
        "qweight": torch.tensor(qweight, dtype=torch.int32).T,
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scales,
        "g_idx": index.to(torch.int32),
        "": ((values - zeros[index]).double() * scales.double()[index]).T,
    }


def pack_awq(weight: torch.Tensor, group: int) -> Tensors:
    index = torch.arange(weight.shape[1]) // group
    values, zeros, scales = grouped(weight.T, 4, index)

    def words(rows: torch.Tensor) -> torch.Tensor:
        packed = []
        for row in rows.tolist():
            eights = [row[start : start + 8] for start in range(0, len(row), 8)]
            packed.append([stream([e[n] for n in AWQ_ORDER], 4)[0] for e in eights])
        return torch.tensor(packed, dtype=torch.int32)

    return {
        "qweight": words(values),
        "qzeros": words(zeros),
        "scales": scales,
        "": ((values - zeros[index]).double() * scales.double()[index]).T,
    }


def quantized(plain: Path, folder: Path, said: dict[str, Any], pack: Any) -> tuple[Path, Tensors]:
    """The base, and its dequantized tensors by the formula."""
    tensors: Tensors = {}
    truth: Tensors = {}
    for name, weight in load_file(plain / WEIGHTS).items():
        if name.endswith("_proj.weight"):
            parts = pack(weight.float())
            truth[name] = parts.pop("").float()
            stem = name.removesuffix("weight")
            tensors |= {stem + part: tensor for part, tensor in parts.items()}
        else:
            tensors[name], truth[name] = weight, weight.float()
    return packed_base(plain, folder, tensors, said), truth


def consecutive(inn: int, size: int) -> torch.Tensor:
    return torch.arange(inn) // size


def shuffled(inn: int, size: int) -> torch.Tensor:
    """Act order: groups of inputs that are not beside each other."""
    order = torch.randperm(inn, generator=torch.Generator().manual_seed(inn))
    return consecutive(inn, size)[order]


GPTQ: dict[str, tuple[int, Any, int, dict[str, Any]]] = {
    "4 bits": (4, consecutive, 1, {}),
    "4 bits, act order": (4, shuffled, 1, {"desc_act": True}),
    "4 bits, second format": (4, consecutive, 0, {"checkpoint_format": "gptq_v2"}),
    "8 bits": (8, consecutive, 1, {}),
    "3 bits": (3, shuffled, 1, {"desc_act": True}),
    "2 bits": (2, consecutive, 1, {"checkpoint_format": "gptq"}),
}


def gptq_base(plain: Path, folder: Path, kind: str) -> tuple[Path, Tensors]:
    bits, order, less, more = GPTQ[kind]
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, **more}
    return quantized(plain, folder, said, lambda w: pack_gptq(w, bits, order(w.shape[1], 32), less))


def awq_base(plain: Path, folder: Path, **more: Any) -> tuple[Path, Tensors]:
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", **more}
    return quantized(plain, folder, said, lambda w: pack_awq(w, 32))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return adapter(plain_base(tmp_path / "plain", torch.float16), tmp_path / "run")


@pytest.mark.parametrize("kind", proving(GPTQ, "gptq", "4 bits", "8 bits", "2 bits"))
def test_gptq(kind: str, run: Path, tmp_path: Path) -> None:
    base, truth = gptq_base(tmp_path / "plain", tmp_path / "base", kind)
    prove(run, base, tmp_path / "out", truth, "this tool, because transformers cannot")


def test_gptq_without_the_group_of_each_input(run: Path, tmp_path: Path) -> None:
    base, truth = gptq_base(tmp_path / "plain", tmp_path / "base", "4 bits")
    tensors = {n: t for n, t in load_file(base / WEIGHTS).items() if not n.endswith("g_idx")}
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    other = packed_base(tmp_path / "plain", tmp_path / "other", tensors, said)
    prove(run, other, tmp_path / "out", truth, "this tool")


def test_a_zero_off_by_one_is_another_base(run: Path, tmp_path: Path) -> None:
    """The first format read as the second."""
    base, _ = gptq_base(tmp_path / "plain", tmp_path / "base", "4 bits")
    merge(run, tmp_path / "out", base=base, dtype="float32")
    said = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    tensors = load_file(base / WEIGHTS)
    other = packed_base(tmp_path / "plain", tmp_path / "other", tensors, said)
    fails_on(run, tmp_path / "out", other)


@proves("awq: gemm")
def test_awq(run: Path, tmp_path: Path) -> None:
    base, truth = awq_base(tmp_path / "plain", tmp_path / "base")
    prove(run, base, tmp_path / "out", truth, "this tool, because transformers cannot")
    name = f"{DOWN}.scales"
    scales = load_file(base / WEIGHTS)[name]
    fails_on(
        run,
        tmp_path / "out" / "float32",
        changed_base(base, tmp_path / "other", name, scales * 1.5),
    )
    plain = merged_logits(tmp_path / "plain") - merged_logits(tmp_path / "out" / "float32")
    assert float(plain.abs().max()) > 1e-2
    tensors = load_file(base / WEIGHTS)
    del tensors[f"{DOWN}.qzeros"]
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    with pytest.raises(BaseError, match="lacks a part"):
        merge(run, tmp_path / "none", base=base)


@pytest.mark.parametrize("kind", ["awq", "3 bits"])
def test_pieces_are_of_the_whole(kind: str, tmp_path: Path) -> None:
    plain = plain_base(tmp_path / "plain", torch.float16)
    other = tmp_path / "base"
    base, truth = awq_base(plain, other) if kind == "awq" else gptq_base(plain, other, kind)
    part = torch.empty(1000)
    open_base(base).tensors[f"{DOWN}.weight"].read_into(part, 777)
    assert torch.equal(part, truth[f"{DOWN}.weight"].flatten()[777:1777])


def test_conv1d_keeps_its_orientation(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=80, n_positions=32)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).half().save_pretrained(tmp_path / "plain")
    run = adapter(tmp_path / "plain", tmp_path / "run", ["c_attn", "c_proj"], fan_in_fan_out=True)
    tensors: Tensors = {}
    truth = load_file(tmp_path / "plain" / WEIGHTS)
    for name, weight in truth.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            parts = pack_gptq(weight.float().T, 4, consecutive(weight.shape[0], 32), 1)
            truth[name] = parts.pop("").T.float()
            tensors |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
        else:
            tensors[name] = weight
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, said)
    opened = open_base(base)
    assert opened.tensors.keys() == truth.keys()
    for name, tensor in opened.tensors.items():
        assert torch.equal(tensor.load().float(), truth[name].float()), name
    merge(run, tmp_path / "out", base=base)
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == truth.keys()


@pytest.mark.parametrize("said", [{"version": "gemv"}, {"bits": 8}])
def test_another_variant(said: dict[str, Any], run: Path, tmp_path: Path) -> None:
    base, _ = awq_base(tmp_path / "plain", tmp_path / "base", **said)
    with pytest.raises(BaseError, match="variant") as caught:
        merge(run, tmp_path / "out", base=base)
    assert str(next(iter(said.values()))) in str(caught.value.found)
    assert not (tmp_path / "out").exists()
    write_adapter(run, tmp_path / "adapter", base=base, target="vllm")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scales", torch.ones(3, 64).half()),
        ("g_idx", torch.full((128,), 9, dtype=torch.int32)),
        ("qzeros", torch.ones(4, 7, dtype=torch.int32)),
    ],
)
def test_damaged(part: str, value: torch.Tensor, run: Path, tmp_path: Path) -> None:
    base, _ = gptq_base(tmp_path / "plain", tmp_path / "base", "4 bits")
    other = changed_base(base, tmp_path / "other", f"{DOWN}.{part}", value)
    with pytest.raises(BaseError):
        merge(run, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


def test_a_base_in_the_place_of_another(tmp_path: Path) -> None:
    """In one process, of the same names and shapes."""
    plain, read = plain_base(tmp_path / "plain", torch.float16), []
    base, _ = gptq_base(plain, tmp_path / "base", "4 bits")
    tensors = load_file(base / WEIGHTS)
    for factor in (1, 3):
        changed = {**tensors, f"{DOWN}.scales": tensors[f"{DOWN}.scales"] * factor}
        save_file(changed, base / WEIGHTS, {"format": "pt"})
        read.append(open_base(base).tensors[f"{DOWN}.weight"].load())
    assert torch.allclose(read[1], 3 * read[0], rtol=1e-3)
    assert read[0].abs().max() > 0
