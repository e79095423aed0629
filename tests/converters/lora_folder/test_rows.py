"""Single rows of an embedding or head, trained whole, in LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from converters.errors import TargetError
from dora_serve import ReadOptions, read_run, verify, write_adapter
from tests.converters.families import save_adapter, save_base

IDS = torch.arange(40).view(2, 20)
EVERY, HEAD, BOTH = [3, 5, 9], {"lm_head": [3, 7]}, {"embed_tokens": [3, 5], "lm_head": [3, 7]}


def run_of(folder: Path, tied: bool, indices: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The live model of a run that trained these rows beside LoRA, and its class."""
    base = folder / "base"
    cls = save_base("llama", base, tied)
    cls.from_pretrained(base, dtype=dtype).save_pretrained(base)
    more = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": indices}
    save_adapter(cls, base, folder / "lora", **more)
    return cls


def computed(cls: Any, base: Path, adapter: Path) -> torch.Tensor:
    live = PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32), str(adapter))
    with torch.inference_mode():
        found: torch.Tensor = live.eval()(IDS).logits
    return found


@pytest.mark.parametrize(
    ("tied", "indices"),
    [(False, EVERY), (False, HEAD), (False, BOTH), (True, EVERY), (True, HEAD)],
)
@pytest.mark.parametrize("max_rank", [None, 4])
def test_they_are_what_peft_computes(
    tmp_path: Path, tied: bool, indices: Any, max_rank: int | None
) -> None:
    cls, base = run_of(tmp_path, tied, indices), tmp_path / "base"
    run = read_run(tmp_path / "lora", ReadOptions(base=base))
    write_adapter(run, tmp_path / "out", base=base, max_rank=max_rank)
    truth = computed(cls, base, tmp_path / "lora")
    assert float((computed(cls, base, tmp_path / "out") - truth).abs().max()) < 1e-5
    assert verify(run, tmp_path / "out", base=base).passed
    assert not any("token_adapter" in name for name in stored(tmp_path / "out"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_rows_of_a_rounded_base(tmp_path: Path) -> None:
    """What a row differs by is from the base as it is stored."""
    cls = run_of(tmp_path, False, EVERY, torch.bfloat16)
    base = tmp_path / "base"
    write_adapter(read_run(tmp_path / "lora", ReadOptions(base=base)), tmp_path / "out", base=base)
    truth = computed(cls, base, tmp_path / "lora")
    assert float((computed(cls, base, tmp_path / "out") - truth).abs().max()) < 1e-5
    (a,) = (t for name, t in stored(tmp_path / "out").items() if "embedding_A" in name)
    assert a.shape[0] == len(EVERY)
    assert set(a.any(dim=0).nonzero().flatten().tolist()) == set(EVERY)


def test_without_the_base_they_are_refused(tmp_path: Path) -> None:
    run_of(tmp_path, False, EVERY)
    run = read_run(tmp_path / "lora", ReadOptions(base=tmp_path / "base"))
    with pytest.raises(TargetError, match="merge it"):
        write_adapter(run, tmp_path / "out")
