"""Speech over HTTP: what transformers' own model writes of the same sounds."""

from __future__ import annotations

import io
import json
import struct
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from schemathesis import GenerationMode
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from converters.model.base import open_base
from converters.targets.onnx import write_onnx
from dora_serve.onnxruntime import Transcriber
from dora_serve.onnxruntime.spectrum import read_spectrum
from dora_serve.onnxruntime.transcriber_queue import TranscriberQueue
from dora_serve.server.options import ServerOptions
from dora_serve.server.wire.errors import ApiError
from dora_serve.server.wire.sounds import _quick, read_form, read_sound
from tests.conftest import randomize
from tests.engines.test_onnx_whisper import STEPS, TIMES, save_whisper, waves
from tests.server.conftest import Server, started
from tests.server.test_schema import statuses_of

RATE = 16_000


def wav(samples: Any, width: int = 2, channels: int = 1, rate: int = RATE) -> bytes:
    """A WAV file of samples between -1 and 1, the same in every channel."""
    file, values = io.BytesIO(), np.repeat(np.clip(samples, -1, 1), channels)
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        if width == 1:
            sound.writeframes((values * 127 + 128).astype("u1").tobytes())
        else:
            whole = (values * (2 ** (8 * width - 1) - 1)).astype("<i4")
            sound.writeframes(whole.view("u1").reshape(-1, 4)[:, :width].tobytes())
    return file.getvalue()


def wave_of(
    kind: int,
    bits: int,
    data: bytes,
    more: bytes = b"",
    told: int | None = None,
    channels: int = 1,
    rate: int = RATE,
) -> bytes:
    """A WAV file as other programs write it. `more`: behind what all say of the numbers; `told`:
    how many bytes of them there are said to be."""
    size = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * size, size, bits) + more
    head = b"LIST\3\0\0\0abc\0fmt " + struct.pack("<I", len(form)) + form
    length = struct.pack("<I", len(data) if told is None else told)
    return b"RIFF\xff\xff\xff\xffWAVE" + head + b"data" + length + data


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("hearing")
    root = place / "models"
    save_whisper(root / "base")
    model = WhisperForConditionalGeneration.from_pretrained(root / "base")
    config = LoraConfig(r=3, lora_alpha=9, target_modules="all-linear")
    randomize(adapted := get_peft_model(model, config))
    adapted.save_pretrained(root / "tuned")
    with started(root, place, None, ServerOptions(threads=1)) as running:
        yield running


def truth(root: Path, name: str, sound: Any, **asked: Any) -> str:
    model: Any = WhisperForConditionalGeneration.from_pretrained(root / "base")
    if name == "tuned":
        model = PeftModel.from_pretrained(model, root / "tuned")
    extract = WhisperFeatureExtractor.from_pretrained(root / "base")
    features = extract(sound, sampling_rate=RATE, return_tensors="pt").input_features
    with torch.no_grad():
        found = model.generate(features, max_new_tokens=STEPS, do_sample=False, **asked)
    words = Tokenizer.from_file(str(root / "base" / "tokenizer.json"))
    told = found[0].tolist()[-STEPS:]
    return words.decode([token for token in told if token not in (1, *range(50, 60), *TIMES)])


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_what_is_heard(hearing: Server, name: str) -> None:
    told = []
    with hearing.openai as client:
        for sound in waves():
            heard = (np.asarray(sound) * 32767).astype("<i2").astype(np.float32) / 32768
            asked: Any = {"model": name, "language": "de", "file": ("a.wav", wav(sound))}
            options = {"max_completion_tokens": STEPS}
            answer = client.audio.transcriptions.create(**asked, extra_body=options)
            expected = truth(hearing.root, name, heard, language="de", task="transcribe")
            assert answer.text.split() == expected.split()
            told.append(answer.text)
        english = client.audio.translations.create(model=name, file=("a.wav", wav(waves()[0])))
    assert english.text
    with hearing.http as http:
        counted = f'dora:adapter_requests_total{{model_name="{name}"}} {len(told) + 1}.0'
        assert (counted in http.get("/metrics").text) == (name == "tuned")
    assert len(set(told)) > (name == "base")  # the tuned one says one thing


def test_what_was_said_before(hearing: Server) -> None:
    """The blank before a word belongs to it, and a text that goes on begins with one."""
    sound = (waves()[0] * 32767).astype("<i2").astype(np.float32) / 32768
    told = []
    for prompt, tokens in (("w20", [56, 20]), ("  w40\n", [56, 40]), ("", None)):
        with hearing.openai as client:
            answer = client.audio.transcriptions.create(
                model="base",
                language="de",
                prompt=prompt,
                file=("a.wav", wav(sound)),
                extra_body={"max_completion_tokens": STEPS},
            )
        before = {} if tokens is None else {"prompt_ids": torch.tensor(tokens)}
        expected = truth(hearing.root, "base", sound, language="de", task="transcribe", **before)
        assert answer.text.split() == expected.split()
        told.append(answer.text)
    assert len(set(told)) == 2


def test_an_adapter_hears_otherwise(hearing: Server) -> None:
    sounds = [np.asarray(each) for each in waves()]
    both = [
        [truth(hearing.root, name, each, language="de") for each in sounds]
        for name in ("base", "tuned")
    ]
    assert both[0] != both[1]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_of_every_width(width: int) -> None:
    sound = np.asarray(waves()[1])
    found = read_sound(wav(sound, width, channels=2), RATE, RATE)
    assert found == pytest.approx(sound, abs=2.0 ** (2 - 8 * min(width, 3)))


@pytest.mark.parametrize("told", [None, 0xFFFFFFFF])
@pytest.mark.parametrize(("kind", "bits"), [(1, 16), (1, 24), (3, 32), (3, 64)])
@pytest.mark.parametrize("extensible", [False, True])
def test_sounds_as_other_programs_write_them(
    kind: int, bits: int, extensible: bool, told: int | None
) -> None:
    """Floats, kinds that are named further on, and lengths that were not known, as in a pipe."""
    sound = np.asarray(waves()[1])
    whole = (sound * (2**31 - 1)).astype("<i4").view("u1").reshape(-1, 4)[:, 4 - bits // 8 :]
    data = sound.astype(f"<f{bits // 8}").tobytes() if kind == 3 else whole.tobytes()
    more = b""
    if extensible:  # ksmedia.h has the rest of the name
        name = struct.pack("<H", kind) + bytes.fromhex("000000001000800000aa00389b71")
        more = struct.pack("<HHI", 22, bits, 4) + name
    file = wave_of(0xFFFE if extensible else kind, bits, data, more, told)
    assert read_sound(file, RATE, RATE) == pytest.approx(sound, abs=2.0**-14)


def test_another_rate_is_the_same_sound() -> None:
    def tones(rate: int) -> Any:
        time = np.arange(rate // 2) / rate
        return 0.5 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 1200 * time)

    for rate, apart in ((8_000, 1e-3), (44_100, 1e-3), (48_000, 1e-3), (12_345, 0.1)):
        for left_out in (0, 13):  # of which half a sample may be left
            heard = tones(rate)[: rate // 2 - left_out]
            found = read_sound(wav(heard, rate=rate), RATE, RATE)
            assert len(found) == round(len(heard) * RATE / rate)
            assert np.abs(found - tones(RATE)[: len(found)])[200:-200].max() < apart


@pytest.mark.parametrize("count", [1, 7, 1_439_999, 4_194_187])
def test_a_length_without_large_factors(count: int) -> None:
    found = left = _quick(count)
    for factor in (2, 3, 5, 7):
        while left % factor == 0:
            left //= factor
    assert left == 1
    assert count <= found <= 1.2 * count


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"", "not a WAV file"),
        (b"RIFF0000WAVEfmt ", "not a WAV file"),
        (b"ID3" + bytes(100), "not a WAV file"),
        (wav(np.zeros(RATE + 1)), "longer than the 1 s"),
        (wav(np.zeros(4)).replace(b"\2\0\x10\0data", b"\x08\0\x40\0data"), "of 8 bytes"),
        (wave_of(7, 8, b"1234"), "kind 7"),
        (wave_of(1, 16, b"1234", channels=0), "0 channels"),
        (wave_of(1, 16, b"1234", rate=0), "0 samples a second"),
        (wav(np.zeros(4)).replace(b"\2\0\x10\0data", b"\x04\0\x18\0data"), "4 bytes for 1 numbers"),
        (wav(np.zeros(4))[:-5], ""),
    ],
)
def test_what_is_no_sound(file: bytes, why: str) -> None:
    if not why:  # cut off: what there is
        assert len(read_sound(file, RATE, RATE)) <= 3
        return
    with pytest.raises(ApiError, match=why):
        read_sound(file, RATE, RATE)


def test_forms() -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
    body = head % b"a" + b"1\r\n\r\n" + head % b"file" + b"\r\n--y\x00\xff\r\n--x--\r\n"
    found = read_form("multipart/form-data; boundary=x", body)
    assert found == {"a": b"1\r\n", "file": b"\r\n--y\x00\xff"}
    for more in (b"", b"\r\n--x" * 99 + b"--"):  # cut off, and of many parts
        with pytest.raises(ApiError, match="no end, or 64 parts"):
            read_form("multipart/form-data; boundary=x", head % b"a" + b"1" + more)
    for long in (b";" * 10**6, b"\r\na: b" * 10**5):  # which takes an hour, or all the memory
        with pytest.raises(ApiError, match="more than 2048 bytes"):
            read_form("multipart/form-data; boundary=x", head[:-4] + long + b"\r\n\r\n\r\n--x--")
    mixed = "*0=x; %s*=utf-8''y"  # which the standard library puts in no order
    part = f"--x\r\nContent-Disposition: form-data; name{mixed % 'name'}\r\n\r\n\r\n--x--"
    assert read_form("multipart/form-data; boundary=x", part.encode()) == {}
    others = ("application/json", "multipart/form-data", "multipart/mixed; boundary=x")
    dear = f"multipart/form-data; boundary=x{';' * 5000}"
    with pytest.raises(ApiError, match="more than 2048 bytes"):
        read_form(dear, body)
    for kind in (*others, f"multipart/form-data; boundary{mixed % 'boundary'}"):
        with pytest.raises(ApiError, match="multipart/form-data"):
            read_form(kind, body)


def test_a_sound_is_read_in_its_turn(hearing: Server, tmp_path: Path) -> None:
    """Of 300 bytes that tell 30 s each, hundreds that wait would hold hundreds of MB."""
    write_onnx(open_base(hearing.root / "base"), tmp_path / "onnx")
    begun, goes_on, read = threading.Event(), threading.Event(), []

    def first() -> Any:
        begun.set()
        assert goes_on.wait(60)
        return waves()[0]

    def second() -> Any:
        read.append(2)
        return waves()[1]

    model = Transcriber(tmp_path / "onnx", threads=1)
    queue = TranscriberQueue(model)
    asked = [queue.submit(sound, None, "de") for sound in (first, second)]
    assert begun.wait(60)
    assert not read
    goes_on.set()
    told = [each.result(60).tokens for each in asked]
    queue.close()
    assert told == [each.tokens for each in model.transcribe(waves()[:2], "de")]


def test_what_is_refused(hearing: Server) -> None:
    with hearing.http as http:
        for asked, param in (
            ({"response_format": "srt"}, "response_format"),
            ({"temperature": "0.5"}, "temperature"),
            ({"stream": "true"}, "stream"),
            ({"hotwords": "a"}, "hotwords"),
            ({"model": "none"}, "model"),
        ):
            form = {"model": "base", **asked}
            file = {"file": ("a.wav", wav(np.zeros(9)))}
            if param == "wave":
                file = {"file": ("a.wav", wave_of(3, 32, np.full(9, np.nan, "<f4").tobytes()))}
            answer = http.post("/v1/audio/transcriptions", data=form, files=file)
            assert answer.status_code in (400, 404)
            assert answer.json()["error"]["param"] == param
        none = wave_of(3, 32, np.full(9, np.nan, "<f4").tobytes())
        for sound in (none, wav(np.zeros(0))):
            answer = http.post(
                "/v1/audio/transcriptions", data={"model": "base"}, files={"file": sound}
            )
            assert (answer.status_code, "finite" in answer.text) == (400, True)
        text = http.post("/v1/completions", json={"model": "base", "prompt": "a"})
        assert text.json()["error"]["code"] == "other_task"
        (first, *_) = http.get("/dora/models").json()["data"]
        assert first["task"] == "automatic-speech-recognition"


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_server_error(hearing: Server, mode: GenerationMode) -> None:
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        assert max(statuses_of(hearing, path, mode, ["base", "tuned"], 20)) < 500


def test_features_are_those_that_transformers_finds(tmp_path: Path) -> None:
    """Of a whole processor, as version 5 saves it, before what may lie beside it."""
    own, other = (WhisperFeatureExtractor(feature_size=20, chunk_length=n) for n in (1, 2))
    sound = waves()[0]
    for step in (1, 2):
        if step == 1:
            own.save_pretrained(tmp_path)
        else:
            said = {"feature_extractor": other.to_dict(), "processor_class": "WhisperProcessor"}
            (tmp_path / "processor_config.json").write_text(json.dumps(said))
        live = WhisperFeatureExtractor.from_pretrained(tmp_path)
        truth = live(sound, sampling_rate=RATE, return_tensors="np").input_features[0]
        found = read_spectrum(tmp_path)(sound)
        assert found.shape == truth.shape == (20, 100 * step)
        assert np.abs(found - truth).max() < 1e-4
