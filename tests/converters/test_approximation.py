"""Methods that are no sum of few components: refused as an adapter without a bound, within the
stated bound with one.

What is stored is compared with the merged weights, which other tests compare with the methods' own
live models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from converters.fit import percent
from dora_serve import DoraExportError, ReadOptions, Run, merge, read_run, write_adapter
from dora_serve.api import export
from tests.conftest import DATA, randomize
from tests.converters import naming
from tests.converters.families import save_base
from tests.converters.made import low_rank, make_run
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


@pytest.mark.parametrize("form", ["transformers 4", "AutoModel", "body twice"])
def test_a_fit_of_a_run_under_other_names(tmp_path: Path, form: str) -> None:
    """The table of errors is of the names that the adapter has; it ended in a KeyError."""
    naming.make(tmp_path, naming.FAMILIES["qwen2"])
    run = naming.renamed(tmp_path / "lora", tmp_path / "run", naming.OTHERS[form])
    out = tmp_path / "out"
    export(run, out, "peft", base=tmp_path / "base", max_rank=2)
    card = (out / "README.md").read_text()
    said = json.loads((out / "dora_export.json").read_text())["fit"]
    assert said["errors"].keys() == said["ranks"].keys()
    assert all(f"| `{m}` | 4 | 2 | {percent(e)} |" in card for m, e in said["errors"].items())


def test_a_fit_of_experts_that_are_apart(tmp_path: Path) -> None:
    """Several modules of the run become one block: no error of any of them is the block's."""
    base, experts = tmp_path / "base", "model.layers.0.block_sparse_moe.experts"
    save_base("mixtral", base)
    shapes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}
    updates = {
        f"{experts}.{number}.{kind}": low_rank(*shape, rank=3)
        for kind, shape in shapes.items()
        for number in range(4)
    }
    run = make_run(tmp_path / "run", updates, task="causal-lm")
    export(run, tmp_path / "out", "peft", base=base, max_rank=2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in all (Frobenius norm)" in card
    assert card.count("| `model.layers.0.mlp.experts.") == 8
