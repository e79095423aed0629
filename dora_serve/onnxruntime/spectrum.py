"""What Whisper hears of a sound: the logarithm of its spectrum, in bands as wide as one hears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_HIGHEST = 8000.0  # Hz, of the uppermost band
_EVEN, _STEP = 1000.0, 200.0 / 3  # Slaney's scale: bands are even up to here, and so wide
_GROWTH = np.log(6.4) / 27  # of a band beyond


class Spectrum:
    """Made by the values of a `preprocessor_config.json` of Whisper's."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.rate = int(said.get("sampling_rate", 16_000))
        self.longest = int(said.get("chunk_length", 30)) * self.rate
        self._size, self._hop = int(said.get("n_fft", 400)), int(said.get("hop_length", 160))
        self._bands = _bands(int(said.get("feature_size", 80)), self._size, self.rate)
        self._window = np.hanning(self._size + 1)[:-1]

    def __call__(self, wave: Array) -> Array:
        """The features `[bands, frames]` of samples `[n]` between -1 and 1, of `longest` at most:
        silence follows them."""
        filled = np.pad(np.asarray(wave, np.float64), (0, self.longest - len(wave)))
        around = np.pad(filled, self._size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(around, self._size)[:: self._hop]
        power = np.abs(np.fft.rfft(frames[:-1] * self._window)) ** 2
        logs = np.log10(np.maximum(self._bands @ power.T, 1e-10))
        return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)


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
