"""What a configuration names and the file lacks, or has beyond it, is said module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from converters.errors import BaseError, RunError
from converters.targets.opening import attach
from dora_serve import ReadOptions, merge, read_run, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import tiny_llama
from tests.converters.naming import errors
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
    "an embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"]},
        "embed_tokens",
    ),
    "an embedding excluded": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"exclude_modules": ["embed_tokens"]},
        "embed_tokens",
    ),
    "biases of factors": ({"lora_bias": True}, {"lora_bias": False}, "layers.0.self_attn.q_proj"),
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


# class, adapted, what the configuration says: what PEFT's own matching names
NAMED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "the first number is the layer": (
        "t5",
        {"target_modules": ["q", "wi"], "layers_to_transform": [0], "task_type": "SEQ_2_SEQ_LM"},
        {},
    ),
    "a pattern of layers": ("llama", {"layers_to_transform": [1]}, {"layers_pattern": "lay.rs"}),
    "parameters are not excluded": (
        "llama",
        {"target_parameters": ["mlp.up_proj.weight"]},
        {"exclude_modules": r".*\.up_proj"},
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_peft_names_is_named(tmp_path: Path, case: str) -> None:
    family, adapted, said = NAMED[case]
    base = tmp_path / "base"
    t5 = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    (tiny_llama() if family == "llama" else T5ForConditionalGeneration(t5)).save_pretrained(base)
    run = run_of(base, tmp_path / "run", **adapted)
    edit(run, **said)
    live = attach(loaded(base), run)
    assert not live.unexpected and not live.missing
    inputs = verification_batch(live.model)
    truth = logits(live.model, inputs)
    assert float((logits(loaded(base), inputs) - truth).abs().max()) > 1e-2
    merge(run, tmp_path / "merged", base=base)
    assert float((logits(loaded(tmp_path / "merged"), inputs) - truth).abs().max()) <= 1e-4


@pytest.mark.parametrize("pattern", ["(q_proj){e<=1}", "[[:alpha:]v]_proj", "q_{proj", r"\{q_proj"])
def test_a_pattern_means_what_it_means_to_peft(
    tmp_path: Path, llama_base: Path, pattern: str
) -> None:
    """`re`, which PEFT uses, reads these letter by letter; others have a sense of their own."""
    run = run_of(llama_base, tmp_path / "run", target_modules=["q_proj", "k_proj", "v_proj"])
    edit(run, alpha_pattern={pattern: 5})
    live = attach(loaded(llama_base), run).model
    inputs = verification_batch(live)
    merge(run, tmp_path / "merged", base=llama_base)
    merged = logits(loaded(tmp_path / "merged"), inputs)
    assert float((merged - logits(live, inputs)).abs().max()) <= 1e-4


def test_a_tied_layer_that_peft_made_without_its_bias_is_refused(tmp_path: Path) -> None:
    base, embedding = tmp_path / "base", "bert.embeddings.word_embeddings"
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(base)
    # By such a name PEFT knows that it is one of embeddings.
    whole = ["lm_head", embedding]
    run = run_of(
        base,
        tmp_path / "run",
        target_modules=["query"],
        modules_to_save=whole,
        ensure_weight_tying=True,
    )
    decoder = attach(loaded(base), run).model.cls.predictions.decoder
    assert decoder.modules_to_save["default"].bias is None
    with pytest.raises(RunError, match="without its bias") as error:
        read_run(run, ReadOptions(base=base))
    assert error.value.tensor == "cls.predictions.decoder.bias"


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


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_with_the_factors_of_a_linear_layer(tmp_path: Path, tied: bool) -> None:
    """As Tinker's converter writes the head that is tied to it: PEFT leaves them out."""
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    run = run_of(base, tmp_path / "run", target_modules=["q_proj", "embed_tokens"])
    tensors = load_file(run / FILE)
    stem = "base_model.model.model.embed_tokens."
    a, b = (tensors.pop(f"{stem}lora_embedding_{letter}") for letter in "AB")
    pair = {f"{stem}lora_A.weight": b.T.contiguous(), f"{stem}lora_B.weight": a.T.contiguous()}
    save_file(tensors | pair, run / FILE, metadata={"format": "pt"})
    with pytest.raises(RunError, match="PEFT leaves out"):
        read_run(run, ReadOptions(base=base))
    assert "embedding" in errors(run, base, "vllm") and errors(run, base, "peft")


@pytest.mark.parametrize("name", ["model.unembed_tokens", "model.layers.0.mlp.experts.w1"])
def test_an_adapter_under_tinkers_names(tmp_path: Path, llama_base: Path, name: str) -> None:
    run = run_of(llama_base, tmp_path / "run")
    pair = {f"base_model.model.{name}.lora_{x}.weight": torch.ones(2, 4, 4) for x in "AB"}
    save_file(load_file(run / FILE) | pair, run / FILE, metadata={"format": "pt"})
    with pytest.raises(RunError, match="build_lora_adapter"):
        read_run(run, ReadOptions(base=llama_base))
