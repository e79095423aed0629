"""An ONNX folder as a model that is called like a transformers model: inputs in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .onnxruntime import Decoder


class OnnxDecoder:
    """Logits `[rows, length, vocab]` of a decoder folder, each row with its adapter or none.

    The rows run as one batch, right-padded, without anything cached before.
    """

    def __init__(self, folder: Path, adapters: Sequence[str | None] | str | None = None) -> None:
        self._decoder = Decoder(folder)
        self.adapters = adapters

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        lengths = attention_mask.sum(dim=1).tolist()
        rows = [row[:n].tolist() for row, n in zip(input_ids, lengths, strict=True)]
        one = isinstance(self.adapters, str) or self.adapters is None
        wanted = [self.adapters] * len(rows) if one else self.adapters
        logits = self._decoder.batch(rows, wanted).prefill_all()  # type: ignore[arg-type]
        padded = np.zeros((*input_ids.shape, logits.shape[-1]), np.float32)
        padded[:, : logits.shape[1]] = logits
        return CausalLMOutput(logits=torch.from_numpy(padded))
