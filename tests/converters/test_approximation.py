"""Methods that are no sum of few components: refused as an adapter without a bound, within the
stated bound with one.

What is stored is compared with the merged weights, which other tests compare with the methods' own
live models.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dora_serve import DoraExportError, ReadOptions, Run, merge, read_run, write_adapter
from tests.conftest import DATA, randomize
from tests.converters.test_peft_tuners import LLAMA, llama

ENERGY = 0.9
STORED = {
    "mora (type 6)": ("mora/llama-type6", "mora/llama"),
    "nvlabs_dora": ("nvlabs_dora/llama-dora", "nvlabs_dora/llama"),
}
NO_MATRIX = {"LNTuningConfig"}  # trains nothing that an adapter could approximate


def reaches_its_bound(run: Run, base: Path, out: Path) -> None:
    with pytest.raises(DoraExportError, match=r"not low-rank(.|\n)*`energy`"):
        write_adapter(run, out / "refused", base=base)
    assert not (out / "refused").exists()
    result = write_adapter(run, out / "adapter", base=base, energy=ENERGY)
    assert result.plan.run.fit is not None
    assert any("approximated" in text for text in result.warnings)
    merge(run, out / "merged", base=base)
    merged = load_file(out / "merged" / "model.safetensors")
    old = load_file(base / "model.safetensors")
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    missed = whole = 0.0
    for module in run.updates:
        delta = (merged[f"{module}.weight"] - old[f"{module}.weight"]).double()
        prefix = f"base_model.model.{module}.lora_"
        if f"{prefix}A.weight" in stored:
            found = stored[f"{prefix}B.weight"].double() @ stored[f"{prefix}A.weight"].double()
        elif f"{prefix}embedding_A" in stored:
            a, b = (stored[f"{prefix}embedding_{part}"].double() for part in "AB")
            found = (b @ a).T
        else:
            found = torch.zeros_like(delta)
        error = float((found - delta).norm() / delta.norm())
        assert error == pytest.approx(result.plan.run.fit.errors[module], abs=1e-3)
        assert error <= math.sqrt(1 - ENERGY) + 1e-3
        missed += float((found - delta).norm() ** 2)
        whole += float(delta.norm() ** 2)
    assert math.sqrt(missed / whole) == pytest.approx(result.plan.run.fit.error, abs=1e-3)


@pytest.mark.parametrize("case", sorted(LLAMA.keys() - NO_MATRIX))
def test_peft_tuners(case: str, llama_base: Path, tmp_path: Path) -> None:
    adapter = llama(llama_base, tmp_path / "lora", case)
    reaches_its_bound(read_run(adapter, ReadOptions(base=llama_base)), llama_base, tmp_path)


@pytest.mark.parametrize("method", STORED)
def test_stored_runs(method: str, tmp_path: Path) -> None:
    run, base = (DATA / "methods" / part for part in STORED[method])
    reaches_its_bound(read_run(run, ReadOptions(base=base)), base, tmp_path)


def test_weight_decomposed_dora_of_peft(llama_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_base), config)
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    reaches_its_bound(read_run(tmp_path / "lora"), llama_base, tmp_path)
