"""PEFT's adapters on every kind of layer, one configuration of each kind: docs/peft.md has all.

The truth is PEFT's own live model of the saved adapter, in a fresh load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from converters.errors import RunError, TargetError
from dora_serve import ReadOptions, merge, read_run, write_adapter, write_onnx
from tests.converters.naming import BOTH, errors

VIT = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30}
TEXT = {"vocab_size": 60, **VIT, "conv_kernel_size": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv1d": ("DebertaV2Model", TEXT),
    "conv1d groups": ("DebertaV2Model", {**TEXT, "conv_groups": 2}),
    "conv2d": (
        "ViTForImageClassification",
        {**VIT, "num_channels": 5, "patch_size": 3, "image_size": 9},
    ),
    "conv2d depthwise": (
        "ConvNextForImageClassification",
        {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "layer_scale_init_value": 1.0}
        | {"image_size": 16, "num_channels": 3},
    ),
    "conv3d": (
        "VideoMAEForVideoClassification",
        {**VIT, "image_size": 8, "patch_size": 4, "num_frames": 4, "num_channels": 3},
    ),
    "attention": ("SiglipVisionModel", {**VIT, "patch_size": 4, "image_size": 8}),
}
LAYERS = {"attention": ["attention", "fc1"], "conv2d depthwise": ["dwconv"]}

# Model, class of PEFT's configuration, its options; whether a LoRA adapter can be the same.
CASES: list[tuple[str, str, dict[str, Any], bool]] = [
    ("conv1d", "LoraConfig", {"use_rslora": True}, True),
    ("conv1d", "LoraConfig", {"use_dora": True}, False),
    ("conv1d groups", "LoKrConfig", {"r": 4}, False),
    ("conv2d", "LoraConfig", {"lora_alpha": 20}, True),
    ("conv2d", "LoraConfig", {"use_dora": True}, False),
    ("conv2d", "LoraConfig", {"lora_bias": True}, False),
    ("conv2d", "AdaLoraConfig", {"total_step": 10}, True),
    ("conv2d", "LoHaConfig", {"use_effective_conv2d": True}, False),
    ("conv2d", "HRAConfig", {}, False),
    ("conv2d", "BOFTConfig", {"boft_block_size": 45}, False),
    ("conv2d", "IA3Config", {"feedforward_modules": []}, False),
    ("conv2d depthwise", "LoHaConfig", {}, False),
    ("conv3d", "LoraConfig", {}, True),
    ("conv3d", "HiraConfig", {}, False),
    ("attention", "LoraConfig", {}, False),
]


def layers(model: str) -> list[str]:
    return LAYERS.get(model, ["conv.conv"] if model.startswith("conv1d") else ["projection"])


def load(folder: Path, model: str) -> Any:
    return getattr(transformers, MODELS[model][0]).from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of each of MODELS."""
    folder = tmp_path_factory.mktemp("bases")
    for name, (kind, options) in MODELS.items():
        torch.manual_seed(0)
        cls = getattr(transformers, kind)
        base = cls(cls.config_class(**options))
        with torch.no_grad():  # wide enough for updates to be seen
            for parameter in base.parameters():
                parameter.mul_(5.0 if parameter.dim() > 1 and parameter.std() < 0.1 else 1.0)
        base.save_pretrained(folder / name)
    return folder


def train(base: Path, model: str, kind: str, options: dict[str, Any], out: Path) -> Path:
    """An adapter of the base with every trained number moved, as PEFT saves it."""
    torch.manual_seed(1)
    config = getattr(peft, kind)(**{"target_modules": layers(model), **options})
    tuned = get_peft_model(load(base, model), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    tuned.save_pretrained(out)
    return out


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    config, generator = model.config, torch.Generator().manual_seed(2)
    if hasattr(config, "vocab_size"):
        found = model(input_ids=torch.randint(0, 60, (2, 30), generator=generator))
    else:
        frames = [config.num_frames] if hasattr(config, "num_frames") else []
        size = [config.num_channels, config.image_size, config.image_size]
        found = model(pixel_values=torch.randn(2, *frames, *size, generator=generator))
    name = next(name for name in ("logits", "pooler_output", "last_hidden_state") if name in found)
    values: torch.Tensor = found[name]
    return values


def far(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize(("model", "kind", "options", "low_rank"), CASES)
def test_equals_pefts_live_model(
    model: str, kind: str, options: dict[str, Any], low_rank: bool, bases: Path, tmp_path: Path
) -> None:
    base = bases / model
    adapter = train(base, model, kind, options, tmp_path / "adapter")
    truth = outputs(PeftModel.from_pretrained(load(base, model), str(adapter)))
    assert far(truth, outputs(load(base, model))) > 1e-2  # the update is seen
    run = read_run(adapter, ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    assert far(truth, outputs(load(tmp_path / "merged", model))) <= 1e-4
    if kind == "LoraConfig":
        told = {e for e in BOTH if not errors(adapter, base, e)}
        assert told == BOTH - ({"transformers"} if options.get("use_dora") else set())
        assert errors(adapter, base, "vllm")
    if low_rank:
        write_adapter(run, tmp_path / "written", base=base)
        written = PeftModel.from_pretrained(load(base, model), str(tmp_path / "written"))
        assert far(truth, outputs(written)) <= 1e-4
    else:
        with pytest.raises(TargetError):
            write_adapter(run, tmp_path / "written", base=base)


def test_an_adapter_on_convolutions_needs_no_base(bases: Path, tmp_path: Path) -> None:
    base = bases / "conv2d"
    adapter = train(base, "conv2d", "LoraConfig", {}, tmp_path / "adapter")
    truth = outputs(PeftModel.from_pretrained(load(base, "conv2d"), str(adapter)))
    write_adapter(read_run(adapter), tmp_path / "written")
    written = PeftModel.from_pretrained(load(base, "conv2d"), str(tmp_path / "written"))
    assert far(truth, outputs(written)) <= 1e-4
    with pytest.raises(TargetError, match="cannot carry"):
        write_adapter(read_run(adapter), tmp_path / "vllm", target="vllm")


def test_an_onnx_graph_has_no_branch_for_a_convolution(bases: Path, tmp_path: Path) -> None:
    base = bases / "conv1d"
    options = {"task_type": "FEATURE_EXTRACTION"}
    adapter = train(base, "conv1d", "LoraConfig", options, tmp_path / "adapter")
    with pytest.raises(TargetError, match="cannot carry"):
        write_onnx(base, tmp_path / "onnx", adapters={"a": read_run(adapter)})


@pytest.mark.parametrize(
    ("model", "kind", "options", "said"),
    [
        ("conv1d groups", "LoraConfig", {}, "reads the channels of all groups"),
        ("conv2d", "OFTConfig", {"r": 5, "oft_block_size": 0}, "overlapping pieces"),
    ],
)
def test_what_no_weight_can_hold_is_refused(
    model: str, kind: str, options: dict[str, Any], said: str, bases: Path, tmp_path: Path
) -> None:
    base = bases / model
    adapter = train(base, model, kind, options, tmp_path / "adapter")
    with pytest.raises(RunError, match=said):
        merge(read_run(adapter, ReadOptions(base=base)), tmp_path / "merged", base=base)
    # PEFT's own merge is another model than its live one, or an error.
    live = PeftModel.from_pretrained(load(base, model), str(adapter)).eval()
    truth = outputs(live)
    try:
        merged = outputs(live.merge_and_unload())
    except RuntimeError:
        return
    assert far(truth, merged) > 1e-2
