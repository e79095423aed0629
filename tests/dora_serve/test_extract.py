"""`extract`: the update between two models gives the tuned model back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dora_serve import DoraExportError, diff, extract, merge, read_run, verify
from dora_serve.commands import dora_export
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import MODELS, tiny_llama
from tests.converters.naming import FAMILIES, load
from tests.converters.tied_families import DECODER, ENCODER, EYES, WHISPER

RUNS = sorted(MODELS.glob("runs/Checkpoint/*/*/*/*"))
EXACT = 1 - 1e-12


def tuned(base: Any, words: tuple[str, ...], rank: int = 2) -> Any:
    """The model with a low-rank change of every matrix, and a change of every vector, named."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if any(word in name for word in words):
                if weight.dim() != 2:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
                    continue
                b = torch.randn(weight.shape[0], rank, generator=generator)
                weight.add_(b @ torch.randn(rank, weight.shape[1], generator=generator) * 0.1)
    return base


def check(base: Path, model: Path, adapter: Path, tolerance: float = 1e-4) -> None:
    """PEFT's model on the base gives the tuned model's logits, which the base does not."""
    truth_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs = verification_batch(truth_model)
    truth = logits(truth_model, inputs)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert float((logits(start, inputs) - truth).abs().max()) > 1e-2
    found = logits(PeftModel.from_pretrained(start, adapter).eval(), inputs)
    assert float((found - truth).abs().max()) <= tolerance
    assert torch.equal(found.argmax(-1), truth.argmax(-1))


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_a_merged_run_comes_back(run: Path, tmp_path: Path) -> None:
    base = MODELS / ("tiny-llama-base" if "Llama" in run.name else "tiny-roberta-base")
    merge(run, tmp_path / "merged", base=base)
    result = extract(tmp_path / "merged", tmp_path / "out", base=base, energy=EXACT)
    assert result.plan.run.fit is not None
    assert result.plan.run.fit.error <= 1e-5
    found = diff(run, tmp_path / "out", base=base)
    assert found.total.relative is not None
    assert found.total.relative <= 1e-5
    assert set(found.whole.values()) <= {0.0}
    if "Llama" in run.name:
        check(base, tmp_path / "merged", tmp_path / "out")
    # The proof of the run itself, whose certificate does not speak of a fit.
    certificate = tmp_path / "out" / "dora_export.json"
    certificate.write_text(json.dumps({**json.loads(certificate.read_text()), "fit": None}))
    assert verify(read_run(run), tmp_path / "out", base).passed


def test_ranks_are_found_and_unchanged_modules_have_none(llama_base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    tuned(model, ("0.self_attn.q_proj", "1.mlp.down_proj", "norm")).save_pretrained(tmp_path / "m")
    arguments = ["extract", str(tmp_path / "m"), str(tmp_path / "out"), "--json"]
    arguments += ["--base", str(llama_base)]
    planned = CliRunner().invoke(dora_export, [*arguments, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert not (tmp_path / "out").exists()
    told = CliRunner().invoke(dora_export, arguments)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert json.loads(planned.stdout) == {**found, "written": False}
    assert found["ranks"] == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.mlp.down_proj": 2,
    }
    assert len(found["whole"]) == 5
    assert all("norm" in name for name in found["whole"])
    assert found["fit"]["limit"] == {"energy": 0.999}
    check(llama_base, tmp_path / "m", tmp_path / "out")
    gguf = ["extract", str(tmp_path / "m"), str(tmp_path / "gguf"), "--base", str(llama_base)]
    refused = CliRunner().invoke(dora_export, [*gguf, "--target", "gguf", "--dry-run"])
    assert refused.exit_code == 1
    assert "norm" in refused.output  # llama.cpp loads no weights of norms


def test_a_low_energy_loses_what_it_says(llama_base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_base)
    tuned(model, ("proj",), rank=12).save_pretrained(tmp_path / "m")
    result = extract(tmp_path / "m", tmp_path / "out", base=llama_base, energy=0.7)
    assert result.plan.run.fit is not None
    assert 0.1 < result.plan.run.fit.error <= 0.3**0.5
    assert any("approximated" in warning for warning in result.warnings)
    found = diff(tmp_path / "m", tmp_path / "out", base=llama_base)
    assert found.total.relative == pytest.approx(result.plan.run.fit.error, rel=1e-4)


def test_conv1d_weights_biases_and_a_tied_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=40)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    tuned(model, ("c_attn", "c_proj")).save_pretrained(tmp_path / "m")
    result = extract(tmp_path / "m", tmp_path / "out", base=tmp_path / "base", energy=EXACT)
    assert result.plan.config["fan_in_fan_out"] is True
    check(tmp_path / "base", tmp_path / "m", tmp_path / "out")


def test_a_changed_embedding_that_the_head_is_tied_to(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    tuned(model, ("q_proj", "embed_tokens")).save_pretrained(tmp_path / "m")
    extract(tmp_path / "m", tmp_path / "out", base=tmp_path / "base", energy=EXACT)
    check(tmp_path / "base", tmp_path / "m", tmp_path / "out")


def test_a_head_that_the_base_lacks_is_carried_whole(tmp_path: Path) -> None:
    """A base without a head, as embedders are saved, lends its embedding to one where it ties them,
    and else has none that an update could be of."""
    model = tiny_llama(tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path / "base")
    tuned(model, ("q_proj",)).save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", energy=EXACT)
    check(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")


@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(n, marks=pytest.mark.further) for n in ("llava", "qwen2-vl"))],
)
def test_names_on_disk_are_others_than_in_memory(tmp_path: Path, family: str) -> None:
    """Of the text and of the eyes: PEFT's merge has every tensor of the tuned model."""
    known = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, known.saved)(known.config())
    model.save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors").keys() - model.state_dict().keys()
    words = ("layers.0.self_attn.q_proj", "blocks.0.attn.qkv", "language_model.norm")
    truth = tuned(model, words).state_dict()
    model.save_pretrained(tmp_path / "m")
    extract(tmp_path / "m", tmp_path / "out", base=tmp_path / "base", energy=EXACT)
    start = load(known, tmp_path / "base")
    changed = {name for name, w in start.state_dict().items() if not torch.equal(w, truth[name])}
    assert {"q_proj", "norm"} <= {name.split(".")[-2] for name in changed}
    assert any("vi" in name for name in changed)  # vision, visual
    merged = PeftModel.from_pretrained(start, str(tmp_path / "out")).merge_and_unload()
    found = merged.state_dict()
    assert max(float((found[name] - truth[name]).abs().max()) for name in truth) <= 1e-5


WHOLE: dict[str, Any] = {
    # A class without a head, and names at whose end PEFT finds another (`embeddings`).
    "BertModel": lambda: transformers.BertConfig(**ENCODER),
    "LlamaModel": lambda: transformers.LlamaConfig(**{**DECODER, "num_key_value_heads": 2}),
    # A tied head with a bias of its own.
    "BertForMaskedLM": lambda: transformers.BertConfig(**ENCODER),
    "CTRLLMHeadModel": lambda: transformers.CTRLConfig(
        n_embd=32, n_layer=1, n_head=4, dff=48, vocab_size=80, n_positions=40
    ),
    # Parameters beside layers in one module.
    "BambaForCausalLM": lambda: transformers.BambaConfig(
        **{**DECODER, "num_hidden_layers": 2, "attn_layer_indices": [1]},
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
    ),
    # A layer that the class reads without calling it.
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**EYES),
    "WhisperForConditionalGeneration": lambda: transformers.WhisperConfig(**WHISPER),
    # A head that is called as modules inside are.
    "GitForCausalLM": lambda: transformers.GitConfig(**ENCODER, vision_config=EYES),
}  # fmt: skip


def all_tuned(name: str, config: Any, folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder / "base")
    tuned(model, ("",)).save_pretrained(folder / "m")
    return folder / "base", folder / "m"


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_fine_tune_of_whatever_class(tmp_path: Path, name: str) -> None:
    base, model = all_tuned(name, WHOLE[name](), tmp_path)
    extract(model, tmp_path / "out", base=base, energy=EXACT)
    truth, start = (
        getattr(transformers, name).from_pretrained(each).eval() for each in (model, base)
    )
    inputs = verification_batch(truth)
    expected = logits(truth, inputs)
    assert float((logits(start, inputs) - expected).abs().max()) > 1e-2
    found = logits(PeftModel.from_pretrained(start, str(tmp_path / "out")).eval(), inputs)
    assert float((found - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("ViTModel", transformers.ViTConfig(**EYES), "embeddings"),
        (
            "CLIPModel",
            transformers.CLIPConfig(
                text_config={**ENCODER, "projection_dim": 16},
                vision_config={**EYES, "projection_dim": 16},
                projection_dim=16,
            ),
            "logit_scale",
        ),
        (
            "LayoutLMv3ForTokenClassification",
            transformers.LayoutLMv3Config(
                **ENCODER, input_size=16, patch_size=4, coordinate_size=4, shape_size=8
            ),
            "layoutlmv3",
        ),
    ],
)
def test_what_peft_has_no_name_for_is_refused(
    tmp_path: Path, name: str, config: Any, words: str
) -> None:
    """A module that PEFT would wrap again inside of itself, a parameter of the model itself, and
    one of the module that everything is in."""
    base, model = all_tuned(name, config, tmp_path)
    with pytest.raises(DoraExportError, match=r"cannot carry|holds whole") as error:
        extract(model, tmp_path / "out", base=base)
    assert words in str(error.value)


def test_a_layer_that_peft_does_not_adapt_in_such_a_model_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=80, state_size=4
    )
    model = transformers.MambaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    tuned(model, ("in_proj", "out_proj")).save_pretrained(tmp_path / "m")
    with pytest.raises(DoraExportError, match="peft does not adapt") as error:
        extract(tmp_path / "m", tmp_path / "out", base=tmp_path / "base")
    assert "mixer.out_proj" in str(error.value)
    with pytest.raises(ValueError, match="out_proj"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj"]))


def test_models_that_are_no_pair_are_refused(
    llama_base: Path, roberta_base: Path, tmp_path: Path
) -> None:
    def refused(model: Path, base: Path, message: str) -> None:
        with pytest.raises(DoraExportError, match=message):
            extract(model, tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()

    refused(llama_base, roberta_base, "different families")
    refused(llama_base, llama_base, "no linear layer differs")
    tuned(tiny_llama(), ("norm",)).save_pretrained(tmp_path / "norms")
    refused(tmp_path / "norms", llama_base, "5 other tensors differ")
    tiny_llama(vocab_size=96).save_pretrained(tmp_path / "words")
    refused(tmp_path / "words", llama_base, "another vocabulary")
    tuned(tiny_llama(), ("q_proj",)).save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForSomething"]})
    )
    refused(tmp_path / "other", llama_base, "class of the tuned model")
