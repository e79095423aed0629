"""An ONNX folder as a model that is called like a transformers model: inputs in, logits out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.files.onnx_files import ENCODER, GENAI

from .adapter_set import Adapters
from .decoder import Decoder
from .encoder import Encoder
from .seq2seq import Seq2Seq
from .transcriber import Transcriber, hears

_STEPS = 8  # tokens of a row that come one after another


class OnnxDecoder:
    """Logits `[rows, length, vocab]` of a decoder folder, each row with its adapter or none.

    The rows run as one batch, right-padded; their last tokens, at most `_STEPS`, come one after
    another, with what is cached of those before.
    """

    def __init__(self, folder: Path, adapters: Adapters = None) -> None:
        self._decoder = Decoder(folder)
        self.adapters = adapters

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        rows = _rows(input_ids, attention_mask)
        steps = min(_STEPS, *(len(row) // 2 for row in rows))
        begun = [row[: len(row) - steps] for row in rows]
        batch = self._decoder.batch(begun, self.adapters)
        logits = batch.prefill_all()
        padded = np.zeros((*input_ids.shape, logits.shape[-1]), np.float32)
        padded[:, : logits.shape[1]] = logits
        places = np.array([len(row) for row in begun])
        for step in range(steps):
            tokens = input_ids.numpy()[np.arange(len(rows)), places + step]
            padded[np.arange(len(rows)), places + step] = batch.step(tokens)
        return CausalLMOutput(logits=torch.from_numpy(padded))


class OnnxEncoder:
    """The outputs of an encoder folder by name, padded with zeros, each row with its adapter."""

    def __init__(self, folder: Path) -> None:
        self._encoder = Encoder(folder)
        self.adapters: Adapters = None

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from transformers.modeling_outputs import ModelOutput

        found = self._encoder.run(_rows(input_ids, attention_mask), self.adapters)
        outputs = {}
        for name in found[0]:
            arrays = [torch.from_numpy(row[name].copy()) for row in found]
            outputs[name] = torch.nn.utils.rnn.pad_sequence(arrays, batch_first=True)
        return ModelOutput(outputs)


class OnnxSeq2Seq:
    """Logits `[rows, length, vocab]` of an encoder-decoder folder that reads, each row with its
    adapter."""

    def __init__(self, folder: Path) -> None:
        self._model = Seq2Seq(folder)
        self.adapters: Adapters = None

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
    ) -> Any:
        from transformers.modeling_outputs import Seq2SeqLMOutput

        rows = _rows(input_ids, attention_mask)
        logits = self._model.logits(rows, decoder_input_ids.tolist(), self.adapters)
        return Seq2SeqLMOutput(logits=torch.from_numpy(logits))


class OnnxTranscriber:
    """The same of one that hears."""

    def __init__(self, folder: Path) -> None:
        self._model = Transcriber(folder)
        self.adapters: Adapters = None

    def __call__(self, input_features: torch.Tensor, decoder_input_ids: torch.Tensor) -> Any:
        from transformers.modeling_outputs import Seq2SeqLMOutput

        targets = decoder_input_ids.tolist()
        logits = self._model.logits(input_features.numpy(), targets, self.adapters)
        return Seq2SeqLMOutput(logits=torch.from_numpy(logits))


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The rows without what pads them on the right."""
    return [row[:n].tolist() for row, n in zip(ids, mask.sum(dim=1).tolist(), strict=True)]


def open_onnx(folder: Path) -> Any:
    """The model in an ONNX folder, by the files it has. `adapters` of it may be set."""
    if (folder / ENCODER).exists():
        return (OnnxTranscriber if hears(folder) else OnnxSeq2Seq)(folder)
    return OnnxDecoder(folder) if (folder / GENAI).exists() else OnnxEncoder(folder)
