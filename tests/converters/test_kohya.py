"""kohya-ss/sd-scripts: `merge_to` of `networks/lora.py` on a CLIP text encoder, in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from converters.errors import RunError
from converters.model.base import open_base
from converters.readers import ReadOptions
from dora_serve import merge, read_run
from tests.converters.other_trainers import drawn

LAYERS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
INPUTS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
    )
    CLIPTextModel(config).eval().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def flat(module: str) -> str:
    """As sd-scripts names a module: the text model as transformers 4 had it, below `text_model`."""
    own = module if module.startswith("text_model.") else f"text_model.{module}"
    return f"lora_te_{own.replace('.', '_')}"


def train(
    base: Path, alpha: float | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    merged: dict[str, torch.Tensor] = {}
    for name, weight in open_base(base).tensors.items():
        if name.endswith(tuple(f"{layer}.weight" for layer in LAYERS)):
            out, inn = weight.shape
            down, up = drawn(3, inn), drawn(out, 3, seed=1)
            stem = flat(name.removesuffix(".weight"))
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            scale = (alpha or 3) / 3
            merged[name] = weight.load().double() + scale * up.double() @ down.double()
    assert len(merged) == 8
    return tensors, merged


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "my_style.safetensors", {"ss_network_dim": "3"})
    return folder


@pytest.mark.parametrize("alpha", [1.0, 0.0, None])
@pytest.mark.supports(method="kohya", family="clip_text_model", targets=("merged",))
def test_a_text_encoder(alpha: float | None, base: Path, tmp_path: Path) -> None:
    tensors, expected = train(base, alpha)
    folder = write(tmp_path / "run", tensors)
    with pytest.raises(RunError, match="`base`"):
        read_run(folder)
    merge(read_run(folder, ReadOptions(base=base)), tmp_path / "merged", base=base)
    found = open_base(tmp_path / "merged").tensors
    for name, weight in expected.items():
        assert float((found[name].load().double() - weight).abs().max()) < 1e-6
    own = CLIPTextModel.from_pretrained(tmp_path / "merged").eval()
    plain = CLIPTextModel.from_pretrained(base).eval()
    with torch.inference_mode():
        moved = own(INPUTS).last_hidden_state - plain(INPUTS).last_hidden_state
    assert float(moved.abs().max()) > 1e-2


def test_what_is_not_read(base: Path, tmp_path: Path) -> None:
    tensors, _ = train(base, 1.0)
    options = ReadOptions(base=base)
    unet = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": drawn(3, 32),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": drawn(32, 3),
    }
    with pytest.raises(RunError, match="more than one model"):
        read_run(write(tmp_path / "unet", {**tensors, **unet}), options)
    second = {n.replace("lora_te_", "lora_te2_"): t.clone() for n, t in tensors.items()}
    with pytest.raises(RunError, match="more than one model"):
        read_run(write(tmp_path / "sdxl", {**tensors, **second}), options)
    strange = {name.replace("q_proj", "qkv"): tensor for name, tensor in tensors.items()}
    with pytest.raises(RunError, match="no module of this name"):
        read_run(write(tmp_path / "strange", strange), options)
    twice = {n.replace("lora_te_text_model_", "lora_te_"): t.clone() for n, t in tensors.items()}
    with pytest.raises(RunError, match="that another name is for"):
        read_run(write(tmp_path / "twice", {**tensors, **twice}), options)
    folder = write(tmp_path / "epochs", tensors)
    save_file(tensors, folder / "my_style-000002.safetensors")
    with pytest.raises(RunError, match="several files"):
        read_run(folder, options)


@pytest.mark.parametrize("alpha", [[1.0, 1.0], math.nan, math.inf])
def test_an_alpha_that_is_none(alpha: float | list[float], base: Path, tmp_path: Path) -> None:
    tensors, _ = train(base, 1.0)
    name = next(name for name in tensors if name.endswith("alpha"))
    changed = {**tensors, name: torch.tensor(alpha)}
    run = read_run(write(tmp_path / "run", changed), ReadOptions(base=base))
    with pytest.raises(RunError, match="not one finite number"):
        [run.updates[module] for module in run.updates]
