"""What Whisper hears of a sound: the logarithm of its spectrum, in bands as wide as one hears."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.json_files import read_json

from .session import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_HIGHEST = 8000.0  # Hz, of the uppermost band
_EVEN, _STEP = 1000.0, 200.0 / 3  # Slaney's scale: bands are even up to here, and so wide
_GROWTH = np.log(6.4) / 27  # of a band beyond
_LARGEST = 1 << 24  # numbers at once; Whisper's have a million


class Spectrum:
    """Made by the values of a `preprocessor_config.json` of Whisper's. Raises `EngineError` for
    values that none has."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        names = {"sampling_rate": 16_000, "chunk_length": 30, "n_fft": 400, "hop_length": 160}
        found = [said.get(name, own) for name, own in {**names, "feature_size": 80}.items()]
        if not all(isinstance(each, int) and 0 < each <= _LARGEST for each in found):
            raise EngineError("the features of sounds are no whole numbers", found=found)
        self.rate, seconds, self._size, self._hop, bands = found
        self.longest = seconds * self.rate
        if max(self.longest, self.longest // self._hop * self._size, bands * self._size) > _LARGEST:
            raise EngineError("the features of sounds are too many", found=found)
        self._bands = _bands(bands, self._size, self.rate)
        self._window = np.hanning(self._size + 1)[:-1]

    def __call__(self, wave: Array) -> Array:
        """The features `[bands, frames]` of samples `[n]` between -1 and 1, of `longest` at most:
        silence follows them."""
        filled = np.pad(np.asarray(wave, np.float64), (0, self.longest - len(wave)))
        around = np.pad(filled, self._size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(around, self._size)[:: self._hop]
        power = np.abs(np.fft.rfft(frames[:-1] * self._window)) ** 2
        logs = np.log10(np.maximum(self._bands @ power.T, 1e-10))
        heard: Array = ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)
        return heard


def read_spectrum(folder: Path) -> Spectrum:
    """As transformers finds it beside a model: what the whole processor says of it, else a file of
    its own. Raises `EngineError` for values that none has."""
    paths = (folder / name for name in ("processor_config.json", "preprocessor_config.json"))
    whole, own = (read_json(path) if path.exists() else {} for path in paths)
    nested = whole.get("feature_extractor")
    return Spectrum(nested if isinstance(nested, dict) else own)


def _bands(count: int, size: int, rate: int) -> NDArray[np.float64]:
    """The weights `[count, size // 2 + 1]` of frequencies in triangular bands of one area."""
    last = _EVEN / _STEP + np.log(_HIGHEST / _EVEN) / _GROWTH
    mels = np.linspace(0, last, count + 2)
    beyond = _EVEN * np.exp(_GROWTH * (mels - _EVEN / _STEP))
    edges = np.where(mels < _EVEN / _STEP, _STEP * mels, beyond)
    ramps = edges[:, None] - np.linspace(0, rate / 2, size // 2 + 1)
    widths = np.diff(edges)[:, None]
    triangles = np.minimum(-ramps[:-2] / widths[:-1], ramps[2:] / widths[1:])
    return np.maximum(0, triangles) * (2 / (edges[2:] - edges[:-2]))[:, None]
