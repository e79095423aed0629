"""Whisper in ONNX Runtime against transformers' own features, logits and transcriptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from converters.model.base import BaseModel, open_base
from converters.targets.onnx import write_onnx
from converters.targets.onnx.seq2seq import name_language
from dora_serve import Run, read_run, verify
from dora_serve.onnxruntime import Search, Seq2Seq, Transcriber
from dora_serve.onnxruntime.session import EngineError
from dora_serve.onnxruntime.spectrum import Spectrum
from tests.conftest import randomize

BOUND, STEPS = 1e-4, 12
WORDS = 60
TEXT = {*range(50)} - {1}  # without the end, languages, tasks and the like
TIMES = {*range(0, 50, 3)}  # which are words to Whisper's tokenizers, as those of a text
# Untrained models say one thing over and over where they may.
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "no_repeat_ngram_size": 2}
LANGUAGES = {"<|en|>": 50, "<|de|>": 51, "<|fr|>": 52}
TOLD: dict[str, Any] = {
    "is_multilingual": True,
    "lang_to_id": LANGUAGES,
    "task_to_id": {"transcribe": 53, "translate": 54},
    "no_timestamps_token_id": 59,
    "prev_sot_token_id": 56,
    "suppress_tokens": [4, 5, 6, *range(50, 60)],
    "begin_suppress_tokens": [7, 1],
    "max_length": 40,
    "return_timestamps": False,
}
SEARCH = Search(STEPS, no_repeat_ngram=2)
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
Built = tuple[BaseModel, dict[str, Run], Path]


def waves() -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Four sounds of other lengths, up to a second, each of tones of its own and noise."""
    seed = np.random.default_rng(0)
    found = []
    for number, length in enumerate((16_000, 9_000, 4_001, 12_345)):
        time = np.arange(length) / 16_000
        tones = sum(np.sin(time * pitch * 400 * (number + 1)) for pitch in (1, 2.7, 5.1))
        found.append((0.2 * tones + 0.05 * seed.standard_normal(length)).astype(np.float32))
    return found


def save_whisper(folder: Path, told: dict[str, Any] = TOLD) -> WhisperForConditionalGeneration:
    """A model that hears a second; `told`: what its generation configuration says."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=WORDS,
        d_model=32,
        num_mel_bins=20,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        max_source_positions=50,
        max_target_positions=40,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():  # zero biases and unit norms would hide what is not computed
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.15)
        decoder = model.model.decoder
        decoder.layer_norm.bias.zero_()
        decoder.embed_positions.weight.mul_(8)
        for layer in decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(8)
    ends = {key: getattr(config, key) for key in ENDS}
    model.generation_config = GenerationConfig(**{**told, **ends})
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=20, chunk_length=1).save_pretrained(folder)
    names = {f"<|{i}.00|>" if i in TIMES else f" w{i}": i for i in range(WORDS)}
    words = Tokenizer(WordLevel(names))
    # Whisper's own class would read these words as bytes.
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("whisper")
    save_whisper(root / "base")
    runs = {}
    for number, name in enumerate(("one", "two")):
        config = LoraConfig(r=3 + number, lora_alpha=5, target_modules="all-linear")
        model = WhisperForConditionalGeneration.from_pretrained(root / "base")
        randomize(peft := get_peft_model(model, config))
        peft.save_pretrained(root / name)
        runs[name] = read_run(root / name)
    base = open_base(root / "base")
    write_onnx(base, root / "onnx", adapters=runs)
    return base, runs, root / "onnx"


def live(built: Built, name: str | None) -> Any:
    """PEFT's own model with an adapter, or the base."""
    model = WhisperForConditionalGeneration.from_pretrained(built[0].path)
    found = model if name is None else PeftModel.from_pretrained(model, built[1][name].path)
    return found.eval()


def features(base: Path) -> torch.Tensor:
    extractor = WhisperFeatureExtractor.from_pretrained(base)
    made = extractor(waves(), sampling_rate=16_000, return_tensors="pt")
    return made.input_features  # type: ignore[no-any-return]


def test_the_spectrum_is_that_of_transformers(built: Built) -> None:
    truth = features(built[0].path).numpy()
    model = Transcriber(built[2])
    found = np.stack([model.spectrum(wave) for wave in waves()])
    assert found.shape == truth.shape and np.abs(found - truth).max() < 1e-4
    other = Spectrum({"feature_size": 20, "chunk_length": 1, "hop_length": 80})
    assert other(waves()[0]).shape != truth[0].shape


@pytest.mark.parametrize("bands", [80, 128])
def test_the_spectrum_of_the_usual_sizes(bands: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=bands)
    truth = extractor(waves()[0], sampling_rate=16_000, return_tensors="np").input_features[0]
    found = Spectrum(extractor.to_dict())(waves()[0])
    assert found.shape == (bands, 3000) and np.abs(found - truth).max() < 1e-4


@pytest.mark.parametrize(
    "said",
    [
        *({name: 10**9} for name in ("feature_size", "n_fft", "chunk_length")),
        *({"hop_length": each} for each in (0, -160, 0.5, "160", None)),
        {"hop_length": 1, "n_fft": 1 << 14},
    ],
)
def test_a_spectrum_that_no_model_has(said: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="the features of sounds"):
        Spectrum(said)


@pytest.mark.supports(method="peft_lora", family="whisper", targets=("onnx",))
def test_rows_with_different_adapters(built: Built) -> None:
    base, runs, out = built
    model, names = Transcriber(out, threads=1), [*runs, None, "one"]
    given, targets = features(base.path), [[2, 50 + i % 3, 53, 59, 9 + i] for i in range(4)]
    truth = {}
    for name in dict.fromkeys(names):
        with torch.inference_mode():
            output = live(built, name)(
                input_features=given, decoder_input_ids=torch.tensor(targets)
            )
        truth[name] = output.logits.numpy()
    mixed = model.logits(given.numpy(), targets, names)
    right = np.stack([truth[name][row] for row, name in enumerate(names)])
    assert np.abs(mixed - right).max() <= BOUND
    wrong = np.stack([truth[name][row] for row, name in enumerate(reversed(names))])
    assert np.abs(mixed - wrong).max() > 1e-2  # the control


@pytest.mark.parametrize(
    ("language", "task"), [("de", "transcribe"), ("fr", "translate"), (None, "transcribe")]
)
def test_transcriptions_are_those_of_transformers(
    built: Built, language: str | None, task: str
) -> None:
    base, runs, out = built
    found, given = {}, features(base.path)
    for name in (*runs, None):
        model = live(built, name)
        wanted = []
        for row in given:  # a batch of transformers' goes on after a row's end
            tokens = model.generate(
                input_features=row[None], language=language, task=task, **OPTIONS
            )[0]
            wanted.append([t for t in tokens.tolist() if t in TEXT])
        done = Transcriber(out).transcribe(waves(), language, task, SEARCH, name)
        found[name] = [each.tokens for each in done]
        assert found[name] == wanted
        for each, row in zip(done, wanted, strict=True):  # without times, as none are asked for
            assert each.text.split() == [f"w{t}" for t in row if t not in TIMES]
    assert any(t in TIMES for rows in found.values() for row in rows for t in row)
    assert found["one"] != found["two"] != found[None]
    assert len({token for row in found[None] for token in row}) > 3
    if language is None:  # each row's own, and not the same for all
        spoken = {each.prompt_tokens[1] for each in done}
        assert spoken <= set(LANGUAGES.values())


def test_text_before_and_beams(built: Built) -> None:
    base, _, out = built
    model, truth = Transcriber(out), live(built, None)
    for beams in (1, 3):
        done = model.transcribe(
            waves()[:1],
            "en",
            search=Search(STEPS, beams=beams, no_repeat_ngram=2),
            prompt=[20, 21, 22],
        )
        wanted = truth.generate(
            input_features=features(base.path)[:1],
            language="en",
            task="transcribe",
            prompt_ids=torch.tensor([56, 20, 21, 22]),
            **OPTIONS,
            num_beams=beams,
        )[0]
        text = [t for t in wanted.tolist() if t in TEXT and t not in (20, 21, 22)]
        assert [t for t in done[0].tokens if t not in (20, 21, 22)] == text and text


def test_the_proof_hears(built: Built) -> None:
    base, runs, out = built
    assert verify(runs["two"], out, base.path).passed
    file = out / "adapters/two.onnx_adapter"
    right = file.read_bytes()
    try:
        shutil.copy(out / "adapters/one.onnx_adapter", file)
        wrong = verify(runs["two"], out, base.path)
    finally:
        file.write_bytes(right)
    assert not wrong.passed and wrong.max_abs > 10 * wrong.tolerance


@pytest.mark.further
def test_a_merged_run(built: Built, tmp_path: Path) -> None:
    base, runs, _ = built
    write_onnx(base, tmp_path / "merged", run=runs["one"])
    assert verify(runs["one"], tmp_path / "merged", base.path).passed
    wrong = verify(runs["two"], tmp_path / "merged", base.path)
    assert not wrong.passed and wrong.max_abs > 10 * wrong.tolerance


def test_a_model_of_english_alone(built: Built, tmp_path: Path) -> None:
    """Which has no languages and tasks to choose from: the same graphs, told otherwise."""
    told = {key: value for key, value in TOLD.items() if not key.endswith("_to_id")}
    save_whisper(tmp_path / "base", {**told, "is_multilingual": False})
    truth = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    shutil.copytree(built[2], tmp_path / "onnx")
    shutil.copy(tmp_path / "base/generation_config.json", tmp_path / "onnx")
    model = Transcriber(tmp_path / "onnx")
    found = [done.tokens for done in model.transcribe(waves(), search=SEARCH)]
    for row, tokens in zip(features(tmp_path / "base"), found, strict=True):
        wanted = truth.generate(input_features=row[None], **OPTIONS)[0].tolist()
        assert tokens == [t for t in wanted if t in TEXT]
    with pytest.raises(EngineError, match="English"):
        model.transcribe(waves(), "de")


@pytest.mark.parametrize("language", ["german", "<|fr|>", "de"])
def test_a_model_tuned_for_one_language(built: Built, tmp_path: Path, language: str) -> None:
    """Which its generation configuration names, with how long an answer becomes."""
    save_whisper(tmp_path / "base", {**TOLD, "language": language, "max_length": 9})
    truth = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    shutil.copytree(built[2], tmp_path / "onnx")
    shutil.copy(tmp_path / "base/generation_config.json", tmp_path / "onnx")
    name_language(tmp_path / "onnx")
    model, spoken = Transcriber(tmp_path / "onnx"), set()
    for row in features(tmp_path / "base"):
        for own in (None, "en"):
            (done,) = model.write(row[None].numpy(), own)
            asked = {"language": own} if own else {}
            wanted = truth.generate(input_features=row[None], task="transcribe", **asked)[0]
            assert done.tokens == [t for t in wanted.tolist() if t in TEXT]
            spoken.add(done.prompt_tokens[1])
    assert spoken == {LANGUAGES["<|en|>"], LANGUAGES["<|fr|>" if "fr" in language else "<|de|>"]}


def told_otherwise(built: Built, folder: Path, told: dict[str, Any]) -> Any:
    """The model with this generation configuration, live; its graphs in `folder`."""
    save_whisper(folder / "base", told)
    shutil.copytree(built[2], folder / "onnx")
    shutil.copy(folder / "base/generation_config.json", folder / "onnx")
    return WhisperForConditionalGeneration.from_pretrained(folder / "base").eval()


@pytest.mark.parametrize("known", [True, False])
def test_what_an_older_configuration_begins_with(built: Built, tmp_path: Path, known: bool) -> None:
    """Which names its language by its token, and may name no others."""
    told = {k: v for k, v in TOLD.items() if known or not k.endswith("_to_id")}
    forced = [[1, 52], [2, 53], [3, 59]]
    truth = told_otherwise(built, tmp_path, {**told, "forced_decoder_ids": forced})
    model = Transcriber(tmp_path / "onnx")
    found = model.transcribe(waves(), search=SEARCH)
    for row, done in zip(features(tmp_path / "base"), found, strict=True):
        wanted = truth.generate(input_features=row[None], **OPTIONS)[0]
        assert done.tokens == [t for t in wanted.tolist() if t in TEXT]
        assert done.prompt_tokens == [2, 52, 53, 59]
    if known:
        (asked,) = model.transcribe(waves()[:1], "de", search=SEARCH)
        assert asked.prompt_tokens == [2, 51, 53, 59]
        (asked,) = model.transcribe(waves()[:1], task="translate", search=SEARCH)
        assert asked.prompt_tokens[2:] == [54, 59]
    else:
        with pytest.raises(EngineError, match="writes English"):
            model.transcribe(waves(), "de")


@pytest.mark.parametrize(
    "said",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": -2.0, "early_stopping": True},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 7},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "renormalize_logits": True},
        {"no_repeat_ngram_size": 1, "forced_bos_token_id": 20},  # before a second token alone
    ],
)
def test_the_search_that_the_configuration_says(
    built: Built, tmp_path: Path, said: dict[str, Any]
) -> None:
    truth = told_otherwise(built, tmp_path, {**TOLD, **said, "max_length": 15})
    found = Transcriber(tmp_path / "onnx").transcribe(waves(), "en")
    plain = Transcriber(tmp_path / "onnx").transcribe(waves(), "en", search=Search(11))
    for row, done in zip(features(tmp_path / "base"), found, strict=True):
        wanted = truth.generate(input_features=row[None], language="en", task="transcribe")[0]
        assert done.tokens == [t for t in wanted.tolist() if t in TEXT]
    assert [done.tokens for done in found] != [done.tokens for done in plain]


@pytest.mark.parametrize(
    "said",
    [
        {"return_timestamps": True},
        {"repetition_penalty": 1.3},
        {"num_beams": 10**9},
        {"num_beams": "four"},
        {"length_penalty": [1]},
        {"forced_decoder_ids": [[1, "en"]]},
        {"forced_decoder_ids": 3},
        {"forced_decoder_ids": [[1, WORDS]]},
    ],
)
def test_what_the_configuration_asks_in_vain(
    built: Built, tmp_path: Path, said: dict[str, Any]
) -> None:
    shutil.copytree(built[2], tmp_path / "onnx")
    told = json.dumps({**TOLD, **dict.fromkeys(ENDS, 1), "decoder_start_token_id": 2, **said})
    (tmp_path / "onnx/generation_config.json").write_text(told)
    with pytest.raises(EngineError, match=next(iter(said))):
        Transcriber(tmp_path / "onnx").transcribe(waves())


def test_a_text_before_that_holds_a_mark(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built[2], tmp_path / "onnx")
    tokenizer = Tokenizer.from_file(str(tmp_path / "onnx/tokenizer.json"))
    tokenizer.add_special_tokens([" w50"])
    tokenizer.save(str(tmp_path / "onnx/tokenizer.json"))
    model = Transcriber(tmp_path / "onnx")
    assert model.transcribe(waves(), "en", prompt=[20])
    with pytest.raises(EngineError, match="a mark"):
        model.transcribe(waves(), "en", prompt=[20, 50])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"language": "xx"}, "no such language"),
        ({"task": "sing"}, "no such task"),
        ({"waves": [np.zeros(16_001, np.float32)]}, "not a wave"),
        ({"waves": [np.zeros(0, np.float32)]}, "not a wave"),
        ({"waves": [np.full(100, np.nan, np.float32)]}, "not a wave"),
        ({"search": Search(40)}, "more tokens"),
        ({"adapters": "three"}, "no such adapter"),
    ],
)
def test_what_cannot_be_asked(built: Built, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        Transcriber(built[2]).transcribe(**{"waves": waves(), **asked})


def test_a_model_that_reads_is_none_that_hears(built: Built) -> None:
    with pytest.raises(EngineError, match="another task"):
        Seq2Seq(built[2])
