"""`verify` itself: it passes what computes the run, on every kind of model, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from converters.readers import ReadOptions
from converters.run import Run
from dora_serve import merge, read_run, verify, write_adapter, write_onnx
from tests.conftest import quick
from tests.converters.families import FAMILIES, MOE, PARAMETERS, save_adapter, save_base
from tests.converters.test_other_ranks import dylora_run

Change = Callable[[str, torch.Tensor], torch.Tensor]


def changed(run: Path, out: Path, change: Change) -> Path:
    """The adapter in `run` with other tensors."""
    out.mkdir()
    (out / "adapter_config.json").write_bytes((run / "adapter_config.json").read_bytes())
    tensors = load_file(run / "adapter_model.safetensors")
    save_file(
        {n: change(n, t).contiguous() for n, t in tensors.items()},
        out / "adapter_model.safetensors",
    )
    return out


def scaled(share: float, word: str = "lora_B") -> Change:
    return lambda name, tensor: tensor * share if word in name else tensor


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "gpt2", "roberta", "t5", "mixtral"))
def test_every_family(tmp_path: Path, family: str) -> None:
    base = tmp_path / "base"
    more = PARAMETERS if family in MOE else {}
    targets = {"gpt2": ["c_attn", "c_proj"], "distilbert": ["q_lin", "lin1"]}
    # The proof's prompts are longer than a window, which is 4096 where nothing is said.
    windowed = family in ("gemma2", "gemma3", "mistral")
    window: dict[str, Any] = {"sliding_window": 24} if windowed else {}
    save_adapter(
        save_base(family, base, **window),
        base,
        tmp_path / "lora",
        target_modules=targets.get(family, "all-linear"),
        fan_in_fan_out=family == "gpt2",
        **more,
    )

    def read(folder: Path) -> Run:
        return read_run(folder, ReadOptions(base=base))

    run = read(tmp_path / "lora")
    half = read(changed(tmp_path / "lora", tmp_path / "half", scaled(0.5)))
    merge(run, tmp_path / "merged", base=base)
    merge(half, tmp_path / "half-merged", base=base)
    write_adapter(run, tmp_path / "adapter", base=base)
    for name in ("merged", "adapter"):
        found = verify(run, tmp_path / name, base)
        assert found.passed
        assert found.has_update
        assert found.control > 10 * found.tolerance
    for wrong in (tmp_path / "half-merged", base):
        found = verify(run, wrong, base)
        assert not found.passed
        assert found.max_abs > found.tolerance


def test_an_adapter_on_an_embedding_that_scales(tmp_path: Path) -> None:
    """Gemma's table of words multiplies what it found, what an adapter adds too."""
    base = tmp_path / "base"
    cls = save_base("gemma", base)
    save_adapter(cls, base, tmp_path / "lora", target_modules=["embed_tokens"])
    run = read_run(tmp_path / "lora", ReadOptions(base=base))
    write_adapter(run, tmp_path / "adapter", base=base, energy=1 - 1e-9)  # not PEFT's own any more
    found = verify(run, tmp_path / "adapter", base)
    assert found.passed and found.truth == "live" and found.control > 10 * found.tolerance
    half = changed(tmp_path / "adapter", tmp_path / "half", scaled(0.5, "lora_embedding_B"))
    certificate = (tmp_path / "adapter" / "dora_export.json").read_bytes()
    (half / "dora_export.json").write_bytes(certificate)
    assert not verify(run, half, base).passed


def test_an_update_smaller_than_the_bound_is_proved_by_its_own_size(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_adapter(save_base("llama", base), base, tmp_path / "lora", target_modules=["q_proj"])
    tiny = changed(tmp_path / "lora", tmp_path / "tiny", scaled(1e-4))
    merge(tiny, tmp_path / "merged", base=base)
    merge(changed(tiny, tmp_path / "half", scaled(0.5)), tmp_path / "halved", base=base)
    run = read_run(tiny, ReadOptions(base=base))
    found = verify(run, tmp_path / "merged", base)
    assert 10 * found.noise < found.control < 1e-4
    assert found.passed
    for wrong in (tmp_path / "halved", base):
        found = verify(run, wrong, base)
        assert not found.passed and found.max_abs > found.tolerance


@pytest.mark.parametrize(
    "change",
    [scaled(0.0), scaled(0.5), scaled(2.0), scaled(-1.0), scaled(0.99), scaled(0.5, "layers.1.")],
    ids=["left out", "half", "double", "turned round", "almost", "one layer"],
)
@pytest.mark.parametrize("target", ["merged", "adapter"])
def test_another_update(
    target: str, change: Change, llama_base: Path, llama_lora: Path, tmp_path: Path
) -> None:
    write: Callable[..., Any] = merge if target == "merged" else write_adapter
    write(changed(llama_lora, tmp_path / "other", change), tmp_path / "out", base=llama_base)
    found = verify(read_run(llama_lora), tmp_path / "out", llama_base)
    assert not found.passed
    assert found.max_abs > found.tolerance


@pytest.mark.parametrize(
    "config", [LoHaConfig(r=4), OFTConfig(r=0, oft_block_size=8)], ids=["loha", "oft"]
)
def test_a_tuner_that_peft_computes(config: Any, llama_base: Path, tmp_path: Path) -> None:
    config.task_type, config.target_modules = "CAUSAL_LM", {"q_proj", "down_proj"}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(tmp_path / "tuned")
    run = read_run(tmp_path / "tuned", ReadOptions(base=llama_base))
    merge(run, tmp_path / "out", base=llama_base)
    assert verify(run, tmp_path / "out", llama_base).passed
    assert not verify(run, llama_base, llama_base).passed


def test_one_file_that_is_several_adapters_of_a_graph(tmp_path: Path) -> None:
    """The first of its names alone was asked, whichever rank was meant, and no second one."""
    base, folder, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    model = save_base("llama", base, num_hidden_layers=1).from_pretrained(base)
    dylora_run(model, folder, ("q_proj", "up_proj"))
    two, four = (read_run(folder, ReadOptions(rank=rank)) for rank in (2, 4))
    write_onnx(base, out, adapters={"two": two, "four": four, "again": four})
    assert verify(two, out, base).passed and verify(four, out, base).passed
    shutil.copy(out / "adapters" / "two.onnx_adapter", out / "adapters" / "again.onnx_adapter")
    assert verify(two, out, base).passed and not verify(four, out, base).passed
