"""What a configuration names and the file lacks, or has beyond it, is said module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from converters.errors import BaseError, RunError
from converters.targets.opening import attach
from dora_serve import ReadOptions, merge, read_run, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.converters.test_promises import FILE, drop, edit, loaded, run_of

# adapted, what the configuration says instead, tensors that are taken out, what is said
UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "one layer is lost": ({}, {}, "layers.1", "layers.1.self_attn.q_proj to be adapted"),
    "by a pattern": ({}, {"target_modules": ".*[qv]_proj"}, "", "v_proj to be adapted"),
    "by its layers": (
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 1]},
        "",
        "layers.1.self_attn.q_proj to be adapted",
    ),
    "a parameter": (
        {},
        {"target_parameters": ["mlp.up_proj.weight"]},
        "",
        "mlp.up_proj.weight to be adapted",
    ),
    "no such module": (
        {},
        {"target_modules": ["q_proj", "zz_proj"]},
        "",
        "target_modules['zz_proj'] is of nothing",
    ),
    "no such layer": ({}, {"layers_to_transform": [0, 1, 7]}, "", "layer 7 is of nothing"),
    "no such rank": ({}, {"rank_pattern": {"nowhere": 2}}, "", "rank_pattern['nowhere'] is of"),
    "no such alpha": ({}, {"alpha_pattern": {"mlp.*": 2}}, "", "alpha_pattern['mlp.*'] is of"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_file_that_is_not_what_its_configuration_names_is_said(
    tmp_path: Path, llama_base: Path, case: str
) -> None:
    adapted, said, lost, expected = UNLIKE[case]
    run = run_of(llama_base, tmp_path / "run", **adapted)
    assert read_run(run, ReadOptions(base=llama_base)).warnings == ()
    edit(run, **said)
    if lost:
        drop(run, lost)
    (warning,) = read_run(run, ReadOptions(base=llama_base)).warnings
    assert expected in warning


# adapted, what the configuration says instead, the first module that it does not name
MORE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "modules": (
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"]},
        "layers.0.self_attn.v_proj",
    ),
    "layers": ({}, {"layers_to_transform": [0]}, "layers.1.self_attn.q_proj"),
    "excluded": ({}, {"exclude_modules": ["0.self_attn.q_proj"]}, "layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("case", MORE)
def test_a_file_that_holds_more_than_its_configuration_names_is_refused(
    tmp_path: Path, llama_base: Path, case: str
) -> None:
    adapted, said, more = MORE[case]
    run = run_of(llama_base, tmp_path / "run", **adapted)
    model = attach(loaded(llama_base), run).model
    inputs = verification_batch(model)
    edit(run, **said)
    left = attach(loaded(llama_base), run)
    assert any(more in name for name in left.unexpected)  # PEFT leaves it out
    assert float((logits(left.model, inputs) - logits(model, inputs)).abs().max()) > 1e-3
    for options in (ReadOptions(base=llama_base), ReadOptions()):
        with pytest.raises(RunError, match="does not name") as error:
            read_run(run, options)
        assert more in str(error.value.tensor)


def test_patterns_that_mean_something_are_not_said(tmp_path: Path, llama_base: Path) -> None:
    config: dict[str, Any] = {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "up_proj": 5},
        "alpha_pattern": {r"layers\.1\..*": 7},
        "layers_to_transform": [1, 0],
        "layers_pattern": "layers",
    }
    run = run_of(llama_base, tmp_path / "run", **config)
    assert read_run(run, ReadOptions(base=llama_base)).warnings == ()
    assert read_run(run).warnings == ()
    write_adapter(run, tmp_path / "adapter", base=llama_base)
    assert read_run(tmp_path / "adapter", ReadOptions(base=llama_base)).warnings == ()


def test_a_tensor_that_the_class_has_not_is_said(tmp_path: Path, llama_base: Path) -> None:
    run = run_of(llama_base, tmp_path / "run", modules_to_save=["lm_head"])
    tensors = load_file(run / FILE)
    save_file({**tensors, "base_model.model.model.zz.weight": torch.ones(3)}, run / FILE)
    artifact = merge(run, tmp_path / "merged", base=llama_base)
    (warning,) = artifact.warnings
    assert "has no model.zz.weight" in warning


def test_a_head_of_other_rows_than_the_embedding_is_refused(
    tmp_path: Path, llama_base: Path
) -> None:
    """Neither PEFT nor the merged model's class would load it."""
    run = run_of(llama_base, tmp_path / "run", modules_to_save=["lm_head"])
    tensors = load_file(run / FILE)
    (key,) = [key for key in tensors if "lm_head" in key]
    save_file({**tensors, key: tensors[key][:-2].clone()}, run / FILE)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(loaded(llama_base), str(run))
    with pytest.raises(BaseError, match="another shape") as error:
        merge(run, tmp_path / "merged", base=llama_base)
    assert error.value.tensor == "lm_head.weight" and error.value.remedy
