"""Models that take something beside text, or instead, are asked all of it: a correct merge passes,
and a fault in any part that was trained fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converters.errors import TargetError
from converters.readers import ReadOptions
from dora_serve import merge, read_run, verify
from tests.conftest import quick, randomize
from tests.converters.test_peft_kinds import saved
from tests.converters.test_zeroed import EYED
from tests.converters.tied_families import DECODER, ENCODER, EYES, KOSMOS, OPT, SPEAKS, TRANSLATOR

WORDS = {**ENCODER, "encoder_hidden_size": 32, "projection_dim": 32}
ASKS = {k: v for k, v in ENCODER.items() if k != "max_position_embeddings"} | {
    "encoder_hidden_size": 32
}
QUERIES = {"qformer_config": ASKS, "text_config": OPT, "num_query_tokens": 4}
PATCHES = {"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 48, "d_kv": 8, "seq_len": 64}
# class → its configuration, what is asked beside text, a layer of each part
CLASSES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "BlipForConditionalGeneration": (
        {"text_config": WORDS, **EYED},
        "pixel_values",
        ("vision_model.encoder.layers.0.mlp.fc1", "attention.self.query"),
    ),
    "BlipForQuestionAnswering": (
        {"text_config": WORDS, **EYED},
        "pixel_values",
        ("vision_model.encoder.layers.0.mlp.fc1", "text_decoder.bert.encoder.layer.0.output.dense"),
    ),
    "Blip2ForConditionalGeneration": (
        {"vision_config": EYES, **QUERIES, "image_token_index": 95},
        "pixel_values",
        ("vision_model.encoder.layers.0.mlp.fc1", "language_projection", "q_proj"),
    ),
    "InstructBlipForConditionalGeneration": (
        {"vision_config": EYES, **QUERIES, "image_token_index": 95},
        "qformer_input_ids",
        ("qformer.encoder.layer.0.intermediate_query.dense", "language_projection", "q_proj"),
    ),
    "Kosmos2ForConditionalGeneration": (
        {"text_config": KOSMOS, **EYED, "latent_query_num": 4},
        "pixel_values",
        ("vision_model.model.encoder.layers.0.mlp.fc1", "text_model.model.layers.0.ffn.fc1"),
    ),
    "LlavaForConditionalGeneration": (
        {
            "text_config": {**OPT, "model_type": "llama", "intermediate_size": 48},
            "vision_config": {**EYES, "model_type": "clip_vision_model"},
            "image_token_index": 95,
            "vision_feature_layer": -1,
        },
        "pixel_values",
        ("vision_tower.encoder.layers.0.mlp.fc1", "language_model.layers.0.mlp.up_proj"),
    ),
    "Pix2StructForConditionalGeneration": (
        {
            "text_config": {"vocab_size": 80, "hidden_size": 32, "d_kv": 8, "d_ff": 48}
            | {"num_layers": 1, "num_heads": 4},
            "vision_config": {**PATCHES, "num_hidden_layers": 1, "num_attention_heads": 4},
        },
        "flattened_patches",
        ("encoder.encoder.layer.0.mlp.wi_0", "decoder.layer.0.mlp.DenseReluDense.wi_0"),
    ),
    "Siglip2Model": (
        {
            "text_config": {**ENCODER, "projection_size": 32},
            "vision_config": {k: v for k, v in EYES.items() if k != "image_size"}
            | {"num_patches": 16},
        },
        "pixel_values",
        ("vision_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
    ),
    "SpeechT5ForTextToSpeech": (
        SPEAKS,
        "decoder_input_values",
        ("encoder.layers.0.attention.q_proj", "speech_decoder_postnet.feat_out"),
    ),
    "SpeechT5ForSpeechToText": (
        SPEAKS,
        "input_values",
        ("encoder.layers.0.attention.q_proj", "text_decoder_postnet.lm_head"),
    ),
    # Whose decoder reads the same text, to its one end.
    "BartForSequenceClassification": (
        TRANSLATOR,
        "random ids",
        ("encoder.layers.0.self_attn.q_proj", "decoder.layers.0.self_attn.q_proj"),
    ),
    # Of characters, without a vocabulary.
    "CanineForSequenceClassification": (
        {**ENCODER, "num_hash_buckets": 64, "local_transformer_stride": 8},
        "random ids",
        ("encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"),
    ),
}


def cases() -> Iterator[Any]:
    for name in CLASSES:
        family = getattr(transformers, name).config_class.model_type
        proves = pytest.mark.supports(method="peft_lora", family=family, targets=("merged",))
        yield pytest.param(name, id=name, marks=[proves])


@pytest.mark.parametrize(
    "name",
    quick(
        cases(),
        *("Blip2ForConditionalGeneration", "LlavaForConditionalGeneration", "Siglip2Model"),
        *("Pix2StructForConditionalGeneration", "SpeechT5ForSpeechToText"),
    ),
)
def test_all_that_a_class_takes_is_asked(tmp_path: Path, name: str) -> None:
    values, asked, parts = CLASSES[name]
    cls = getattr(transformers, name)
    base = saved(name, cls.config_class.__name__, values, tmp_path / "base")
    layers = {
        part: next(n for n, m in cls.from_pretrained(base).named_modules() if n.endswith(part))
        for part in parts
    }
    peft = get_peft_model(
        cls.from_pretrained(base), LoraConfig(r=2, lora_alpha=8, target_modules=[*layers.values()])
    )
    randomize(peft)
    peft.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merged = tmp_path / "merged"
    merge(run, merged, base=base)
    found = verify(run, merged, base)
    assert found.passed and found.truth == "peft" and not found.left
    assert found.tolerance == 1e-4 and found.control > 10 * found.tolerance
    assert any(asked in each for each in found.asked)
    tensors = load_file(merged / "model.safetensors")
    for part, layer in layers.items():
        wrong = tmp_path / part
        wrong.mkdir()
        ends = (f"{layer}.weight", f"{'.'.join(layer.split('.')[-4:])}.weight")  # or on disk
        own = next(key for end in ends for key in tensors if key.endswith(end))
        save_file(
            {**tensors, own: tensors[own] * 1.5}, wrong / "model.safetensors", {"format": "pt"}
        )
        shutil.copy(merged / "config.json", wrong)
        fault = verify(run, wrong, base)
        assert not fault.passed and fault.max_abs > 3 * fault.tolerance, part


def test_boxes_are_compared_too(tmp_path: Path) -> None:
    """The layers that find boxes have no say in the classes of what is found."""
    config = transformers.YolosConfig(**{**EYES, "image_size": [16, 16]}, num_detection_tokens=4)
    torch.manual_seed(0)
    base, layer = tmp_path / "base", "bbox_predictor.layers.0"
    transformers.YolosForObjectDetection(config).save_pretrained(base)
    model = transformers.YolosForObjectDetection.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=64, target_modules=[layer]))
    randomize(peft)
    peft.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    assert verify(run, tmp_path / "merged", base).passed
    assert not verify(run, base, base).passed


def test_what_cannot_be_asked_is_refused_and_not_called_broken(tmp_path: Path) -> None:
    """A class that wants numbers over time: the merge is right, and no prompt is known."""
    config = transformers.PatchTSMixerConfig(
        context_length=16, prediction_length=4, patch_length=4, patch_stride=4, d_model=16,
        num_layers=1,
    )  # fmt: skip
    base, lora = tmp_path / "base", tmp_path / "lora"
    transformers.PatchTSMixerForPrediction(config).save_pretrained(base)
    model = transformers.PatchTSMixerForPrediction.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["fc1"]))
    randomize(peft)
    peft.save_pretrained(lora)
    run = read_run(lora, ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    with pytest.raises(TargetError, match="does not know what to ask") as error:
        verify(run, tmp_path / "merged", base)
    assert error.value.remedy


def test_an_update_that_no_answer_shows(tmp_path: Path) -> None:
    """Images take more places in this class's texts than they have patches: what sees them is not
    asked, and nothing is called proved."""
    values = {
        "text_config": {**OPT, "model_type": "llama", "intermediate_size": 48},
        "vision_config": {**EYES, "model_type": "clip_vision_model"},
        "image_token_index": 95,
        "vision_feature_select_strategy": "full",
    }
    name = "LlavaForConditionalGeneration"
    base = saved(name, "LlavaConfig", values, tmp_path / "base")
    model = getattr(transformers, name).from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=r".*vision_tower.*fc1"))
    randomize(peft)
    peft.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    found = verify(run, tmp_path / "merged", base)
    assert not found.passed and "nothing was proved" in found.failures[0]
    assert found.left == ("images and sound: only its text was asked",)


def test_a_voice_that_draws_lots(tmp_path: Path) -> None:
    """Of other weights its speech has another length, and of another dtype it draws other lots."""
    base, name = tmp_path / "base", "VitsModel"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "flow_size": 32}
    convolved = {"upsample_initial_channel": 16, "upsample_rates": [4, 4]}
    kernels = {"upsample_kernel_sizes": [8, 8], "resblock_kernel_sizes": [3]}
    config = transformers.VitsConfig(
        num_hidden_layers=1, vocab_size=80, spectrogram_bins=17, prior_encoder_num_flows=2,
        posterior_encoder_num_wavenet_layers=2, prior_encoder_num_wavenet_layers=2,
        depth_separable_num_layers=2, duration_predictor_filter_channels=16, **sizes,
        resblock_dilation_sizes=[[1, 3]], **convolved, **kernels,
    )  # fmt: skip
    transformers.VitsModel(config).save_pretrained(base)
    lora = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"])
    peft = get_peft_model(getattr(transformers, name).from_pretrained(base), lora)
    randomize(peft)
    peft.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    found = verify(run, tmp_path / "merged", base)
    assert found.passed and found.tolerance < 1e-2
    assert not verify(run, base, base, earlier=found).passed


GEMMA4 = {"global_head_dim": 8, "vocab_size_per_layer_input": 80, "hidden_size_per_layer_input": 8}
SEES = {"num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 64}


@pytest.mark.parametrize(
    "parts",
    [
        {"vision_config": {**EYES, **SEES}},
        pytest.param({}, marks=pytest.mark.further, id="text alone"),
    ],
    ids="-".join,
)
def test_a_part_that_the_base_lacks_is_not_asked(tmp_path: Path, parts: dict[str, Any]) -> None:
    """Gemma 4 without ears, whose class takes sound all the same."""
    name, values = "Gemma4ForConditionalGeneration", {"text_config": {**DECODER, **GEMMA4}, **parts}
    base = saved(name, "Gemma4Config", values, tmp_path / "base")
    model = getattr(transformers, name).from_pretrained(base)
    assert model.config.audio_config is None
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*(q_proj|down_proj)")
    peft = get_peft_model(model, lora)
    randomize(peft)
    peft.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", ReadOptions(base=base))
    merge(run, tmp_path / "merged", base=base)
    found = verify(run, tmp_path / "merged", base)
    assert found.passed and found.truth == "peft"
    assert found.left == (("images and sound: only its text was asked",) if parts else ())
    assert not verify(run, base, base).passed
