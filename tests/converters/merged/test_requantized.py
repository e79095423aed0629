"""Merging into float8 by blocks and back. The truth is the dequantized live model, whose weights
transformers and PEFT make, and what float8 can hold of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from converters.errors import DoraExportError
from converters.readers import ReadOptions, read_run
from dora_serve.api import merge
from dora_serve.proof.verify import Verification, verify
from tests.converters.made import WEIGHTS

from ..quantized import adapter, experts_base, fails_on, packed_base, plain_base
from ..test_certificate_schema import faults
from .test_quantized_fp8 import FP8, Tensors, by_hand, pack

ROWS, COLUMNS = 32, 64
BLOCK = "weight_block_size"
SAID = {**FP8, BLOCK: [ROWS, COLUMNS]}
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A base in blocks, and an adapter trained on it."""
    run = adapter(plain_base(tmp_path / "plain"), tmp_path / "run")
    tensors = pack(tmp_path / "plain", ROWS, COLUMNS)
    return packed_base(tmp_path / "plain", tmp_path / "base", tensors, SAID), run


def trained(base: Path, run: Path) -> Tensors:
    """The weights of PEFT's own live model on the base that transformers dequantizes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, run).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def verified(run: Path, out: Path, base: Path) -> Verification:
    return verify(read_run(run, ReadOptions(base=base)), out, base)


def by_block(tensor: torch.Tensor) -> torch.Tensor:
    """`[blocks, weights]` of whole blocks."""
    rows, columns = (n // size for n, size in zip(tensor.shape, (ROWS, COLUMNS), strict=True))
    return tensor.view(rows, ROWS, columns, COLUMNS).transpose(1, 2).reshape(rows * columns, -1)


@pytest.mark.supports(
    method="peft_lora", family="llama", base="fp8: blocks again", targets=("merged",)
)
def test_what_changes_gets_fresh_scales_and_the_rest_stays(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    base, run = made
    out = merge(run, tmp_path / "out", base=base, requantize=True)
    found, before = load_file(tmp_path / "out" / WEIGHTS), load_file(base / WEIGHTS)
    truth = trained(base, run)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert found.keys() == before.keys() and config["quantization_config"] == SAID
    floats = by_hand(found, ROWS, COLUMNS)
    changed = [n for n in truth if n.endswith(("q_proj.weight", "down_proj.weight"))]
    assert len(changed) == 4
    errors = []
    for name in changed:
        assert found[name].dtype == torch.float8_e4m3fn
        right, got = by_block(truth[name].double()), by_block(floats[name].double())
        scales = right.abs().amax(dim=1, keepdim=True) / 448
        # Half a step of float8: 2^-4 of a number, or 2^-10 of the scale below its normal ones.
        steps = torch.maximum(right.abs() / 16, scales / 1024)
        assert bool(((got - right).abs() <= steps * 1.001).all())
        assert float((got - right).abs().max()) > 0  # it does lose something
        kept = found[f"{name}_scale_inv"].double().flatten()
        assert torch.allclose(kept, scales.flatten(), rtol=1e-6)
        assert not torch.equal(found[f"{name}_scale_inv"], before[f"{name}_scale_inv"])
        errors.append((got - right).abs())
    for name in before.keys() - {n for each in changed for n in (each, f"{each}_scale_inv")}:
        assert found[name].view(torch.uint8).equal(before[name].view(torch.uint8)), name
    told = out.report.summary()["requantized"]
    flat = torch.cat([each.flatten() for each in errors])
    assert told["tensors"] == 4
    assert told["mean_error"] == pytest.approx(float(flat.mean()), rel=1e-3)
    assert told["max_error"] == pytest.approx(float(flat.max()), rel=1e-3)
    proof = json.loads((tmp_path / "out/dora_export.json").read_text())
    assert proof["requantized"] == told and "dequantized" not in proof
    merge(run, tmp_path / "floats", base=base)
    for folder, key in (("out", "requantized"), ("floats", "dequantized")):
        certificate = json.loads((tmp_path / folder / "dora_export.json").read_text())
        assert faults(certificate) == [] and faults({**certificate, key: "true"})
    assert any("float8 again" in line for line in out.report.lines())


def test_the_proof_of_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = made
    merge(run, tmp_path / "out", base=base, requantize=True)
    right = verified(run, tmp_path / "out", base)
    assert right.passed and right.truth == "peft" and right.lost is not None, right
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    old = load_file(base / WEIGHTS)
    q = f"{Q}_scale_inv"
    wrong = {
        "without the update": {Q: old[Q], q: old[q]},
        "the old scales": {q: old[q]},
        "a scale too small": {q: tensors[q] * 0.9},
    }
    for number, changes in enumerate(wrong.values()):
        folder = tmp_path / f"wrong{number}"
        merge(run, folder, base=base, requantize=True)
        save_file({**tensors, **changes}, folder / WEIGHTS, {"format": "pt"})
        found = verified(run, folder, base)
        assert not found.passed and found.max_abs > 10 * found.tolerance, found
    scale = old[f"{UP}_scale_inv"].clone()
    scale[0] *= 2
    other = packed_base(
        tmp_path / "plain", tmp_path / "other", {**old, f"{UP}_scale_inv": scale}, SAID
    )
    fails_on(run, tmp_path / "out", other)


@pytest.mark.parametrize("changes", [{"scale_fmt": "ue8m0"}, {"scales": torch.bfloat16}])
def test_other_kinds_of_scales(changes: dict[str, Any], tmp_path: Path) -> None:
    """As DeepSeek-V3.1 has them, powers of two; and Qwen3, bfloat16."""
    run = adapter(plain_base(tmp_path / "plain"), tmp_path / "run")
    tensors, kept = pack(tmp_path / "plain", ROWS, COLUMNS), changes.pop("scales", torch.float32)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].to(kept)
        if changes:
            weight = by_block(tensors[name.removesuffix("_scale_inv")].float())
            assert weight.abs().max() <= 448
            tensors[name] = 2 ** tensors[name].log2().ceil()
    base = packed_base(tmp_path / "plain", tmp_path / "base", tensors, {**SAID, **changes})
    merge(run, tmp_path / "out", base=base, requantize=True)
    found = load_file(tmp_path / "out" / WEIGHTS)
    scales = found[f"{Q}_scale_inv"]
    assert scales.dtype == kept and not torch.equal(scales, tensors[f"{Q}_scale_inv"])
    assert not changes or torch.equal(scales.log2(), scales.log2().round())
    right = verified(run, tmp_path / "out", base)
    assert right.passed, right


@pytest.mark.parametrize(
    ("said", "asked", "message"),
    [
        (None, {}, "float8 by blocks"),
        ({**FP8, "weight_block_size": None}, {}, "float8 by blocks"),
        (SAID, {"dtype": "float32"}, "no other dtype"),
    ],
)
def test_what_is_not_quantized_again(
    said: dict[str, Any] | None, asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = adapter(plain_base(tmp_path / "plain"), tmp_path / "run")
    base = tmp_path / "plain"
    if said is not None:
        base = packed_base(base, tmp_path / "base", pack(base, ROWS, COLUMNS), said)
    with pytest.raises(DoraExportError, match=message):
        merge(run, tmp_path / "out", base=base, requantize=True, **asked)
    assert not (tmp_path / "out").exists()


def test_experts_that_are_fused_in_memory(tmp_path: Path) -> None:
    """What holds no update is judged as it was, under the parameter's name too."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 64}
    plain = experts_base("Qwen3Moe", tmp_path / "plain", **sizes)
    run = adapter(plain, tmp_path / "run", ["o_proj"])
    base = packed_base(plain, tmp_path / "base", pack(plain, 48, 48), SAID | {BLOCK: [48, 48]})
    out = merge(run, tmp_path / "out", base=base, requantize=True).path
    found = verified(run, out, base)
    assert found.passed, found


def test_trained_rows_of_a_tied_embedding(tmp_path: Path) -> None:
    """PEFT holds the head's weight apart, of which the file says nothing: it is the embedding's."""
    plain = plain_base(tmp_path / "plain", tie_word_embeddings=True)
    run = adapter(plain, tmp_path / "run", trainable_token_indices=[3, 5])
    base = packed_base(plain, tmp_path / "base", pack(plain, ROWS, COLUMNS), SAID)
    out = merge(run, tmp_path / "out", base=base, requantize=True).path
    assert "lm_head.weight" not in load_file(out / WEIGHTS)
    found = verified(run, out, base)
    assert found.passed, found


def test_conv1d_is_not_quantized_again(tmp_path: Path) -> None:
    """Its floats lie the other way round than what is packed."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=80, n_positions=32)
    plain = tmp_path / "plain"
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(plain)
    run = adapter(plain, tmp_path / "run", ["c_attn"], fan_in_fan_out=True)
    tensors, name = load_file(plain / WEIGHTS), "transformer.h.0.attn.c_attn.weight"
    tensors[name] = tensors[name].T.to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(6, 2)
    base = packed_base(plain, tmp_path / "base", tensors, {**FP8, "weight_block_size": [32, 32]})
    with pytest.raises(DoraExportError, match="quantized again"):
        merge(run, tmp_path / "again", base=base, requantize=True)
    assert not (tmp_path / "again").exists()
    merged = load_file(merge(run, tmp_path / "out", base=base).path / WEIGHTS)
    assert merged[name].shape == (64, 192)
