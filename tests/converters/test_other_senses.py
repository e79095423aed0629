"""Families that see and hear, and ties and tables of theirs: merged and as adapters, against PEFT's
live model. A layer that PEFT's live model has no use of is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import DoraExportError
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify, write_adapter
from dora_serve.proof.verify import logits, verification_batch
from tests.conftest import quick, randomize
from tests.converters.families import ENCODER
from tests.converters.tied_families import CONVOLUTIONS, EYES, TRANSLATOR

WAVES = {
    **{k: v for k, v in ENCODER.items() if k not in ("max_position_embeddings", "vocab_size")},
    "vocab_size": 32,
    **CONVOLUTIONS,
    "classifier_proj_size": 32,
    "tdnn_dim": [32],
    "tdnn_kernel": [3],
    "tdnn_dilation": [1],
}
STAGES = {
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 32,
    "sr_ratios": [4, 2, 1, 1],
    "num_labels": 5,
}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
ZAMBA = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
    "n_mamba_heads": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


def fsmt() -> Any:
    own = {k: v for k, v in TRANSLATOR.items() if k != "vocab_size"}
    return transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=80, tgt_vocab_size=80, **own, tie_word_embeddings=True
    )


def reads_pictures() -> Any:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**EYES),
        transformers.TrOCRConfig(
            d_model=32,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            vocab_size=80,
            cross_attention_hidden_size=32,
        ),
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def detr() -> Any:
    own = {k: v for k, v in TRANSLATOR.items() if k.startswith(("d_", "encoder", "decoder_"))}
    own.pop("decoder_start_token_id")
    return transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(**RESNET), num_queries=6, **own
    )


CONFIGS: dict[str, Any] = {
    "BertForTokenClassification": lambda: transformers.BertConfig(**ENCODER, num_labels=3),
    "MoshiForCausalLM": lambda: transformers.MoshiConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, ffn_dim=48, max_position_embeddings=40,
    ),
    "DetrForObjectDetection": detr,
    "FSMTForConditionalGeneration": fsmt,
    "SegformerForSemanticSegmentation": lambda: transformers.SegformerConfig(**STAGES),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**EYES),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=80,
        decoder_start_token_id=0,
    ),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**EYES),
    "ViTForMaskedImageModeling": lambda: transformers.ViTConfig(**EYES, encoder_stride=4),
    "ViTModel": lambda: transformers.ViTConfig(**EYES),
    "VisionEncoderDecoderModel": reads_pictures,
    "WavLMForCTC": lambda: transformers.WavLMConfig(**WAVES),
    "Wav2Vec2ForXVector": lambda: transformers.Wav2Vec2Config(**WAVES),
    "Wav2Vec2Model": lambda: transformers.Wav2Vec2Config(**WAVES),
    "ZambaForCausalLM": lambda: transformers.ZambaConfig(**ZAMBA),
}  # fmt: skip


def base(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def load(name: str, folder: Path, **more: Any) -> Any:
    torch.manual_seed(1)
    return getattr(transformers, name).from_pretrained(folder, **more).eval()


def trained(name: str, folder: Path, out: Path, config: dict[str, Any], **more: Any) -> Any:
    """PEFT's live model of an adapter whose every trained number was moved; it is in `out`."""
    told = LoraConfig(r=2, lora_alpha=6, **config)
    model = get_peft_model(load(name, folder, **more), told)
    randomize(model, ("lora_", "modules_to_save", "trainable_tokens_delta", ".bias"))
    model.save_pretrained(out, save_embedding_layers=False)
    return PeftModel.from_pretrained(load(name, folder, **more), str(out)).eval()


def apart(live: Any, other: Any) -> float:
    inputs = verification_batch(live)
    return float((logits(live, inputs) - logits(other, inputs)).abs().max())


SHARED = "shared_transf.feed_forward.down_proj"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "layers that share a weight, the first": (
        "ZambaForCausalLM",
        {"target_modules": [f"model.layers.2.{SHARED}"]},
    ),
    "layers that share a weight, another": (
        "ZambaForCausalLM",
        {"target_modules": [f"model.layers.4.{SHARED}"]},
    ),
    "layers that share a weight, whole": (
        "ZambaForCausalLM",
        {"target_modules": ["up_proj"], "modules_to_save": [f"model.layers.2.{SHARED}"]},
    ),
    "convolutions of other names on disk": (
        "SegformerForSemanticSegmentation",
        {
            "target_modules": ["sequence_reduction.sequence_reduction", "q_proj"],
            "modules_to_save": ["decode_head"],
        },
    ),
    "boxes": ("DetrForObjectDetection", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "masked pictures": ("ViTForMaskedImageModeling", {"target_modules": "all-linear"}),
    "an entry inside of another's": (
        "Wav2Vec2ForXVector",
        {"target_modules": ["q_proj"], "modules_to_save": ["feature_extractor"]},
    ),
    "kept tied, by a name PEFT does not know": (
        "T5ForConditionalGeneration",
        {"target_modules": ["q"], "modules_to_save": ["shared"], "ensure_weight_tying": True},
    ),
    "a head's bias beside its LoRA": (
        "BertForTokenClassification",
        {"target_modules": ["query", "classifier"], "bias": "all"},
    ),
    "an embedding of more rows than words": (
        "MoshiForCausalLM",
        {"target_modules": ["q_proj.linear"], "modules_to_save": ["embed_tokens"]},
    ),
    "rows of a class that names no ties": (
        "FSMTForConditionalGeneration",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"model.encoder.embed_tokens": [5, 9, 30]},
        },
    ),
    "rows of what only a part ties": (
        "VisionEncoderDecoderModel",
        {
            "target_modules": ["fc1"],
            "trainable_token_indices": {"decoder.model.decoder.embed_tokens": [5, 9, 30]},
        },
    ),
}


MERGED = "rows of a class that names no ties"  # of a weight with more rows than words


def cases() -> Iterator[Any]:
    for case, (name, _) in CASES.items():
        family = getattr(transformers, name).config_class.model_type
        targets = ("merged",) if case == MERGED else ("merged", "peft")
        proves = pytest.mark.supports(method="peft_lora", family=family, targets=targets)
        yield pytest.param(case, id=case, marks=[proves])


@pytest.mark.parametrize(
    "case",
    quick(
        cases(),
        *("layers that share a weight, another", "convolutions of other names on disk"),
        *("an entry inside of another's", "kept tied, by a name PEFT does not know"),
        *("a head's bias beside its LoRA", "rows of a class that names no ties"),
    ),
)
def test_what_is_written_equals_pefts_live_model(tmp_path: Path, case: str) -> None:
    name, config = CASES[case]
    folder = base(name, tmp_path / "base")
    live = trained(name, folder, tmp_path / "run", config)
    run = read_run(tmp_path / "run", ReadOptions(base=folder))
    merge(run, tmp_path / "merged", base=folder)
    assert apart(live, load(name, tmp_path / "merged")) < 1e-4
    found = verify(run, tmp_path / "merged", folder)
    assert found.passed and found.truth == "peft", found
    assert not verify(run, folder, folder, earlier=found).passed
    if case != MERGED:
        write_adapter(run, tmp_path / "adapter", base=folder)
        again = PeftModel.from_pretrained(load(name, folder), str(tmp_path / "adapter")).eval()
        assert apart(live, again) < 1e-4


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("WavLMForCTC", ["q_proj", "v_proj"]),
        ("SiglipVisionModel", ["head.attention.out_proj"]),
        ("Wav2Vec2ForXVector", ["tdnn.0.kernel"]),
        ("DetrForObjectDetection", ["query_position_embeddings"]),
    ],
)
def test_a_weight_that_is_read_without_being_called(
    tmp_path: Path, name: str, targets: list[str]
) -> None:
    folder = base(name, tmp_path / "base")
    live = trained(name, folder, tmp_path / "run", {"target_modules": targets})
    assert apart(live, load(name, folder)) < 1e-6
    assert apart(live.merge_and_unload(), load(name, folder)) > 1e-4
    run = read_run(tmp_path / "run", ReadOptions(base=folder))
    for write in (merge, write_adapter):
        with pytest.raises(DoraExportError, match="without calling it"):
            write(run, tmp_path / "out", base=folder)


def test_a_head_of_the_class_that_peft_notes(tmp_path: Path) -> None:
    """No task was told, and the base is saved without the head: the right base is named."""
    name = "ViTForImageClassification"
    folder = base("ViTModel", tmp_path / "base")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    live = trained(name, folder, tmp_path / "run", config, num_labels=5)
    with pytest.raises(DoraExportError, match="another class") as error:
        read_run(tmp_path / "run", ReadOptions(base=folder))
    assert f"{name}.from_pretrained" in str(error.value)
    load(name, folder, num_labels=5).save_pretrained(tmp_path / "classifier")
    run = read_run(tmp_path / "run", ReadOptions(base=tmp_path / "classifier"))
    merge(run, tmp_path / "merged", base=tmp_path / "classifier")
    assert apart(live, load(name, tmp_path / "merged")) < 1e-4
    assert apart(live, load(name, tmp_path / "classifier")) > 1e-3


def test_a_classifier_whose_task_nobody_told(tmp_path: Path) -> None:
    name, heads = "Wav2Vec2ForSequenceClassification", ["projector", "classifier"]
    folder = base("Wav2Vec2Model", tmp_path / "base")
    config = {"target_modules": ["q_proj"], "modules_to_save": heads}
    live = trained(name, folder, tmp_path / "run", config, num_labels=6)
    run = read_run(tmp_path / "run", ReadOptions(base=folder))
    assert (run.task, run.num_labels) == ("sequence-classification", 6)
    merge(run, tmp_path / "merged", base=folder)
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == [name]
    assert apart(live, load(name, tmp_path / "merged")) < 1e-4
    assert verify(run, tmp_path / "merged", folder).passed


def test_a_bias_of_one_layer_that_is_lost(tmp_path: Path) -> None:
    name = "ViTForMaskedImageModeling"
    folder = base(name, tmp_path / "base")
    told = LoraConfig(target_modules=["q_proj"], bias="lora_only")
    get_peft_model(load(name, folder), told).save_pretrained(tmp_path / "run")
    read_run(tmp_path / "run", ReadOptions(base=folder))
    file = tmp_path / "run" / "adapter_model.safetensors"
    kept = load_file(file)
    del kept[next(key for key in kept if key.endswith(".bias"))]
    save_file(kept, file)
    with pytest.raises(DoraExportError, match="biases were trained"):
        read_run(tmp_path / "run", ReadOptions(base=folder))


def test_some_biases_of_all_that_are_lost(tmp_path: Path) -> None:
    """PEFT takes the base's for them and says nothing; the merge is the same, and says it."""
    name = "ViTForMaskedImageModeling"
    folder, run = base(name, tmp_path / "base"), tmp_path / "run"
    live = get_peft_model(load(name, folder), LoraConfig(target_modules=["q_proj"], bias="all"))
    randomize(live, ("lora_", ".bias"))
    live.save_pretrained(run)
    whole = read_run(run, ReadOptions(base=folder))
    assert not whole.warnings
    write_adapter(whole, tmp_path / "adapter", base=folder)
    again = read_run(tmp_path / "adapter", ReadOptions(base=folder))
    assert not again.warnings and again.replaced.keys() == whole.replaced.keys()
    file = Path(shutil.copytree(run, tmp_path / "lossy")) / "adapter_model.safetensors"
    kept = load_file(file)
    lost = next(key for key in kept if key.endswith("fc1.bias"))
    save_file({key: tensor for key, tensor in kept.items() if key != lost}, file)
    some = read_run(file.parent, ReadOptions(base=folder))
    assert lost.removeprefix("base_model.model.") in some.warnings[0]
    merge(some, tmp_path / "merged", base=folder)
    assert verify(some, tmp_path / "merged", folder).passed
    assert not verify(whole, tmp_path / "merged", folder).passed


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_state_of_a_model_with_trained_rows(tmp_path: Path, tied: bool) -> None:
    """As FSDP gathers it, with the adapter's name in every key and the frozen weights beside."""
    from tests.conftest import tiny_llama

    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}
    live = trained("LlamaForCausalLM", tmp_path / "base", tmp_path / "run", config)
    state = {key: value.clone() for key, value in live.state_dict().items()}
    assert any(key.endswith("trainable_tokens_delta.default") for key in state)
    save_file(state, tmp_path / "run" / "adapter_model.safetensors")
    run = read_run(tmp_path / "run", ReadOptions(base=tmp_path / "base"))
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    assert apart(live, load("LlamaForCausalLM", tmp_path / "merged")) < 1e-4
    assert apart(live, load("LlamaForCausalLM", tmp_path / "base")) > 1e-3
    assert verify(run, tmp_path / "merged", tmp_path / "base").passed


def test_a_tied_head_that_is_stored_beside_its_lora_and_bias(tmp_path: Path) -> None:
    """PEFT stores both sides of the pair that it adapts, as of a model with more words."""
    name = "BertForMaskedLM"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, vocab_size=80)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "base")
    told = LoraConfig(
        target_modules=["value", "bert.embeddings.word_embeddings", "decoder"], bias="lora_only"
    )
    model = get_peft_model(load(name, tmp_path / "base"), told)
    randomize(model, ("lora_", ".bias"))
    model.save_pretrained(tmp_path / "run", save_embedding_layers=True)
    live = PeftModel.from_pretrained(load(name, tmp_path / "base"), str(tmp_path / "run")).eval()
    run = read_run(tmp_path / "run", ReadOptions(base=tmp_path / "base"))
    write_adapter(run, tmp_path / "adapter", base=tmp_path / "base")
    base = load(name, tmp_path / "base")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert apart(live, again) < 1e-4 < 1e-2 < apart(live, load(name, tmp_path / "base"))
