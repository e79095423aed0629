"""Merging into bases of compressed-tensors: written by the library, and the truth is what
transformers loads of them with it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import BaseError
from converters.lint import lint
from converters.model.base import open_base
from converters.readers import ReadOptions, read_run
from dora_serve.api import merge, write_adapter
from dora_serve.proof.verify import verify
from tests.conftest import randomize
from tests.converters.made import WEIGHTS
from tests.converters.quantized import (
    adapter,
    changed_base,
    experts_base,
    fails_on,
    packed_base,
    plain_base,
    prove,
    proving,
)

pytest.importorskip("compressed_tensors")
Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.0.mlp.down_proj"
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp8, one scale": ("FP8", "float-quantized", {}),
    "fp8, rows": ("FP8_DYNAMIC", "float-quantized", {}),
    "fp8, blocks": ("FP8_BLOCK", "float-quantized", {"block_structure": [32, 64]}),
    "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized", {}),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized", {}),
    "int8, rows": ("W8A8", "int-quantized", {}),
    "int4": ("W4A16", "pack-quantized", {"group_size": 32}),
    "int4, with zeros": ("W4A16_ASYM", "pack-quantized", {"group_size": 32}),
    "int3": ("W3A16", "pack-quantized", {"group_size": 32}),
}
FURTHER = ("fp8, one scale", "fp8, blocks", "mxfp4", "int8, rows", "int4")


def quantized(plain: Path, folder: Path, kind: str) -> Path:
    """Every linear layer but the head, by the library's own scales and compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    preset, form, more = KINDS[kind]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights = scheme.weights.model_copy(update=more)
    scheme.format = form
    args, tensors = scheme.weights, {}
    for name, weight in load_file(plain / WEIGHTS).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        weight = weight.float()
        out, inn = weight.shape
        rows, columns = {
            "tensor": (out, inn),
            "channel": (1, inn),
            "block": (32, 64),
        }.get(str(args.strategy), (1, args.group_size))
        blocks = weight.view(out // rows, rows, inn // columns, columns)
        state = {"weight": weight}
        extra = {}
        if str(args.strategy) == "tensor_group":
            extra["global_scale"] = generate_gparam(weight.amin(), weight.amax())
            state["weight_global_scale"] = extra["global_scale"]
        scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args, **extra)
        if str(args.strategy) == "tensor":
            scale, zero = scale.view(1), zero.view(1)
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        made = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            made["input_scale"] = torch.ones(1)
        tensors |= {f"{name.removesuffix('weight')}{part}": t for part, t in made.items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    return packed_base(plain, folder, tensors, config.model_dump(mode="json", exclude_none=True))


def loaded(base: Path) -> Tensors:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
    )
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name.endswith("weight")}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return adapter(plain_base(tmp_path / "plain"), tmp_path / "run")


@pytest.mark.parametrize("kind", proving(KINDS, "compressed-tensors", *FURTHER))
def test_what_was_trained(kind: str, run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", kind)
    assert open_base(base).fault is None
    prove(run, base, tmp_path / "out", loaded(base), "transformers (compressed-tensors)")


def test_a_whole_layer_beside_a_quantized_one_is_told(tmp_path: Path) -> None:
    """PEFT puts a copy of the base's layer there, whose packed numbers no adapter has."""
    plain = plain_base(tmp_path / "plain")
    base = quantized(plain, tmp_path / "base", "int8, rows")
    for module, wrong in (("down_proj", True), ("lm_head", False)):
        model = transformers.AutoModelForCausalLM.from_pretrained(plain)
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module])
        peft = get_peft_model(model, config)
        randomize(peft, ("lora_", "modules_to_save"))
        run, out = tmp_path / f"{module}-run", tmp_path / module
        peft.save_pretrained(run)
        warnings = write_adapter(run, out, base=base).warnings
        assert any("quantized in the base" in told for told in warnings) == wrong
        errors = [f.check for f in lint(out, open_base(base), ["peft"]) if f.severity == "error"]
        assert errors == (["quantized"] * 2 if wrong else [])
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        with pytest.raises(KeyError, match="weight_scale") if wrong else nullcontext():
            PeftModel.from_pretrained(model, out)


@pytest.mark.parametrize(
    ("kind", "part"), [("fp8, rows", "weight_scale"), ("nvfp4", "weight_global_scale")]
)
def test_another_scale_is_another_base(kind: str, part: str, run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", kind)
    merge(run, tmp_path / "out", base=base, dtype="float32")
    name = f"{DOWN}.{part}"
    value = load_file(base / WEIGHTS)[name] * 2
    fails_on(run, tmp_path / "out", changed_base(base, tmp_path / "other", name, value))


def test_another_format(run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", "int4")
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace("pack-quantized", "marlin-24"))
    with pytest.raises(BaseError, match="variant") as caught:
        merge(run, tmp_path / "out", base=base)
    assert "marlin-24" in str(caught.value.found) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["weight_shape", "weight_scale"])
def test_damaged(part: str, run: Path, tmp_path: Path) -> None:
    base = quantized(tmp_path / "plain", tmp_path / "base", "int4")
    name = f"{DOWN}.{part}"
    value = load_file(base / WEIGHTS)[name][:1].contiguous()
    with pytest.raises(BaseError):
        merge(run, tmp_path / "out", base=changed_base(base, tmp_path / "other", name, value))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        ("int4", "weight_scale", "another shape"),
        ("int4, with zeros", "weight_zero_point", "lacks a part"),
        ("fp8, blocks", None, "not of its format"),
    ],
)
def test_parts_are_those_that_the_configuration_tells(
    kind: str, part: str | None, said: str, run: Path, tmp_path: Path
) -> None:
    """A scale for a whole row in the place of groups, no zeros, blocks of no size: each of them is
    another way to quantize, which this base is not in."""
    base = quantized(tmp_path / "plain", tmp_path / "base", kind)
    tensors, config = load_file(base / WEIGHTS), json.loads((base / "config.json").read_text())
    if part == "weight_scale":
        tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"][:, :1].clone()
    elif part is not None:
        del tensors[f"{DOWN}.{part}"]
    else:
        for group in config["quantization_config"]["config_groups"].values():
            group["weights"]["block_structure"] = None
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match=said):
        merge(run, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_groups_by_the_order_of_activations(run: Path, tmp_path: Path) -> None:
    """`weight_g_idx`, as the library wrote it until 2026: what it quantizes are the inputs of one
    group after the other's."""
    base = quantized(tmp_path / "plain", tmp_path / "base", "int4")
    before = open_base(base).tensors[f"{DOWN}.weight"].load()
    columns = before.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    stored = load_file(base / WEIGHTS)
    groups = torch.arange(columns, dtype=torch.int32) // 32
    words = stored[f"{DOWN}.weight_packed"]
    numbers = (words[:, :, None] >> torch.arange(0, 32, 4)) & 15
    turned = numbers.flatten(1)[:, order].view(*words.shape, 8).long()
    packed = (turned << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
    tensors = {
        **stored,
        f"{DOWN}.weight_packed": packed,
        f"{DOWN}.weight_g_idx": groups[order].contiguous(),
    }
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    opened = open_base(base)
    assert torch.equal(opened.tensors[f"{DOWN}.weight"].load(), before[:, order])
    assert f"{DOWN}.weight_g_idx" not in opened.tensors
    out = merge(run, tmp_path / "out", base=base, dtype="float32").path
    assert set(load_file(out / WEIGHTS)) == set(load_file(tmp_path / "plain" / WEIGHTS))
    unset = torch.full((columns,), -1, dtype=torch.int32)
    save_file({**stored, f"{DOWN}.weight_g_idx": unset}, base / WEIGHTS, {"format": "pt"})
    assert torch.equal(open_base(base).tensors[f"{DOWN}.weight"].load(), before)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """transformers fuses them, and leaves their scales out."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 64}
    plain = experts_base("Qwen3Moe", tmp_path / "plain", **sizes)
    run = adapter(plain, tmp_path / "run", ["q_proj"])
    base = quantized(plain, tmp_path / "base", "fp8, rows")
    merge(run, tmp_path / "out", base=base, dtype="float32")
    found = verify(read_run(run, ReadOptions(base=base)), tmp_path / "out", base)
    assert found.passed and "fuses experts" in str(found.dequantized)


@pytest.mark.parametrize("said", ["128x128", [128, 128]])
def test_blocks_of_which_the_last_are_smaller(said: object, tmp_path: Path) -> None:
    """As text, as the library wrote it until 2025, and in the second of two groups."""
    plain, name = plain_base(tmp_path / "plain"), f"{DOWN}.weight"
    base = quantized(plain, tmp_path / "base", "fp8, blocks")
    config = json.loads((base / "config.json").read_text())
    group = config["quantization_config"]["config_groups"].pop("group_0")
    groups = {
        kind: {**group, "weights": {**group["weights"], "block_structure": size}}
        for kind, size in (("group_0", [32, 64]), ("group_1", said))
    }
    config["quantization_config"]["config_groups"] = groups
    (base / "config.json").write_text(json.dumps(config))
    stored = load_file(base / WEIGHTS)
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(1))
    scale = torch.arange(1.0, 7).view(2, 3)
    stored |= {name: weight.to(torch.float8_e4m3fn), f"{DOWN}.weight_scale": scale}
    save_file(stored, base / WEIGHTS, {"format": "pt"})
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:192, :320]
    found = open_base(base)
    assert found.fault is None
    assert torch.equal(found.tensors[name].load(), stored[name].float() * wide)
