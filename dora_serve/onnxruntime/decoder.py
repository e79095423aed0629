"""Decoders in ONNX Runtime: one process, no torch, another adapter in every row of a batch.

>>> from dora_serve.onnxruntime import Decoder
>>> decoder = Decoder("onnx/")
>>> for done in decoder.generate(["count : nine"] * 2, adapters=[None, "count-down"]):
...     print(done.text)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.onnx_files import ADAPTER_INDEX, LOGITS_POSITIONS, ROW_LENGTHS

from .adapter_set import Adapters
from .binding import Binding
from .decoder_graph import DecoderGraph
from .generation import Generation, Logprobs
from .limits import check_rows
from .sampling import Sampling
from .session import EngineError, Prompt, padded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

_EVERYWHERE = np.zeros((0, 0), np.int64)  # positions of logits


@dataclass
class Completion:
    """One finished row. `logprobs`: at every step the log-probability of the token drawn, and the
    likeliest tokens with theirs. `reason`: "stop" or "length"."""

    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = "length"
    logprobs: list[Logprobs] = field(default_factory=list)


class Decoder(DecoderGraph):
    """A decoder folder as `dora-export onnx` writes it, with its adapters.

    `threads` None is one per core; `max_rows` bounds a batch and `max_length` (default: the
    model's context) the tokens of a row, prompt included.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        max_rows: int = 64,
        max_length: int | None = None,
    ) -> None:
        super().__init__(folder, threads, max_length)
        self.max_rows = max_rows
        self.adapter_set.add_all(self.folder)

    def batch(self, prompts: Sequence[Sequence[int]], adapters: Adapters = None) -> Batch:
        """Begin a batch of token rows, each with its adapter or with none."""
        check_rows(prompts, self.max_length - 1)
        if len(prompts) > self.max_rows:
            raise EngineError(
                "more rows than the cache holds",
                found=len(prompts),
                expected=f"at most {self.max_rows}",
            )
        wanted = self.adapter_set.per_row(adapters, len(prompts))
        return Batch(self, prompts, self.adapter_set.feeds(wanted))

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Adapters = None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Complete every prompt with its adapter (one name for all, or one per prompt).

        Raises `EngineError` for an unknown adapter, an empty prompt, or one that is too long.
        """
        sampling = sampling or Sampling()
        rows = [self.encode(prompt) for prompt in prompts]
        batch = self.batch(rows, adapters)
        room = self.max_length - max(map(len, rows))
        running = dict(
            enumerate(Generation(row, sampling, self.eos, self.tokenizer, room) for row in rows)
        )
        done = list(running.values())
        logits = batch.prefill()
        while True:
            for row, generation in list(running.items()):
                generation.take(logits[row])
                if generation.reason is not None:
                    del running[row]
            if not running:
                return [_completion(generation) for generation in done]
            tokens = np.zeros(len(rows), np.int64)
            for row, generation in running.items():
                tokens[row] = generation.tokens[-1]
            logits = batch.step(tokens)


def _completion(done: Generation) -> Completion:
    assert done.reason is not None
    return Completion(done.prompt, done.tokens, done.text, done.reason, done.logprobs)


class Batch:
    """Rows that are decoded together.

    Graphs with GroupQueryAttention write keys and values in place, into a cache of the full
    length; the others (float16) hand back a cache that has grown.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        adapters: Mapping[str, NDArray[Any]],
    ) -> None:
        from onnxruntime import OrtValue

        self._decoder, self._adapters = decoder, adapters
        self._rows = [list(prompt) for prompt in prompts]
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        self._mask = np.zeros((len(prompts), 0), np.int64)
        length = decoder.max_length if decoder.in_place else 0
        shape = (len(prompts), decoder.heads, length, decoder.head_size)
        # The binding reads and writes the memory of these arrays.
        self._arrays = [np.zeros(shape, decoder.cache_type) for _ in decoder.cache]
        cache = [OrtValue.ortvalue_from_numpy(array) for array in self._arrays]
        self._binding = Binding(decoder, cache, adapters)

    def prefill(self) -> Logits:
        """Run all prompts; the logits `[rows, vocab]` after the last token of each."""
        return self._run_prompts(self.lengths[:, None] - 1)[:, 0]

    def prefill_all(self) -> Logits:
        """Run all prompts; the logits `[rows, longest, vocab]`, meaningless beyond a row's end."""
        return self._run_prompts(_EVERYWHERE)

    def _run_prompts(self, wanted: NDArray[np.int64]) -> Logits:
        positions = np.arange(self.lengths.max())
        ids = padded(self._rows, 0)
        self._mask = (positions < self.lengths[:, None]).astype(np.int64)
        return self._run(ids, np.tile(positions, (len(ids), 1)), wanted)

    def step(self, tokens: NDArray[np.int64]) -> Logits:
        """Add one token to every row; the logits `[rows, vocab]` after it."""
        for crossing in np.flatnonzero(self.lengths == self._decoder.border):
            self._again(int(crossing))
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        self.lengths = self.lengths + 1
        if self._decoder.in_place:  # the token lies right behind its row's last
            self._mask = (np.arange(self.lengths.max()) < self.lengths[:, None]).astype(np.int64)
        else:  # the token lies behind the longest row's
            self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None], self.lengths[:, None] - 1, _EVERYWHERE)[:, 0]

    def _again(self, row: int) -> None:
        """Compute what the cache holds of a row anew, as it is for rows beyond the border."""
        own = {**self._adapters, ROW_LENGTHS: self.lengths[[row]] + 1}
        if ADAPTER_INDEX in own:
            own[ADAPTER_INDEX] = own[ADAPTER_INDEX][[row]]
        alone = Batch(self._decoder, [self._rows[row]], own)
        alone.prefill()
        for array, filled in zip(self._arrays, alone._arrays, strict=True):
            array[row] = filled[0]

    def _run(
        self, ids: NDArray[np.int64], positions: NDArray[np.int64], wanted: NDArray[np.int64]
    ) -> Logits:
        feeds = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        return self._binding.run({**feeds, LOGITS_POSITIONS: wanted})
