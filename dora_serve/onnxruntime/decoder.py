"""Decoders in ONNX Runtime: one process, no torch, another adapter in every row of a batch.

>>> from dora_serve.engines.onnxruntime import Decoder
>>> decoder = Decoder("onnx/")
>>> for done in decoder.generate(["count : nine"] * 2, adapters=[None, "count-down"]):
...     print(done.text)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.onnx_files import ADAPTER_INDEX, LOGITS_POSITIONS, NO_ADAPTER

from .decoder_graph import DecoderGraph
from .generation import Generation, Logprobs
from .sampling import Sampling
from .session import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

Prompt = str | Sequence[int]
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

    def batch(self, prompts: Sequence[Sequence[int]], adapters: Iterable[str | None]) -> Batch:
        """Begin a batch of token rows, each with an adapter or with none."""
        wanted = list(adapters)
        if len(wanted) != len(prompts) or not prompts:
            raise EngineError(
                "one adapter (or None) per prompt", found=len(wanted), expected=len(prompts)
            )
        self.adapter_set.check(wanted)
        if len(prompts) > self.max_rows:
            raise EngineError(
                "more rows than the cache holds",
                found=len(prompts),
                expected=f"at most {self.max_rows}",
            )
        used = tuple(dict.fromkeys(name for name in wanted if name is not None))
        index = [NO_ADAPTER if name is None else used.index(name) for name in wanted]
        return Batch(self, prompts, np.array(index, np.int64), self.adapter_set.stacked(used))

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[str | None] | str | None = None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Complete every prompt with its adapter (one name for all, or one per prompt).

        Raises `EngineError` for an unknown adapter, an empty prompt, or one that is too long.
        """
        sampling = sampling or Sampling()
        rows = [self.encode(prompt) for prompt in prompts]
        wanted = (
            [adapters] * len(rows) if isinstance(adapters, str) or adapters is None else adapters
        )
        batch = self.batch(rows, wanted)
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
        index: Any,
        adapters: Mapping[str, Any],
    ) -> None:
        from onnxruntime import OrtValue

        longest = max(len(prompt) for prompt in prompts)
        if longest >= decoder.max_length or not all(prompts):
            raise EngineError(
                "a prompt is empty or too long",
                found=f"{min(map(len, prompts))} to {longest} tokens",
                expected=f"1 to {decoder.max_length - 1}, room for one more",
            )
        self._decoder, self._session = decoder, decoder.session
        # The binding reads the memory of these arrays, so they live as long as the batch.
        self._prompts, self._index, self._adapters = prompts, index, adapters
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        self._mask = np.zeros((len(prompts), 0), np.int64)
        length = decoder.max_length if decoder.in_place else 0
        shape = (len(prompts), decoder.heads, length, decoder.head_size)
        self._binding = self._session.io_binding()
        self._binding.bind_output("logits")
        self._arrays = [np.zeros(shape, decoder.cache_type) for _ in decoder.cache]
        for name, array in zip(decoder.cache, self._arrays, strict=True):
            value = OrtValue.ortvalue_from_numpy(array)  # over the same memory
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            if decoder.in_place:
                self._binding.bind_ortvalue_output(f"present.{name}", value)
        if decoder.adapter_set.batched:
            self._binding.bind_cpu_input(ADAPTER_INDEX, index)
        for name, array in adapters.items():
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))

    def prefill(self) -> Logits:
        """Run all prompts; the logits `[rows, vocab]` after the last token of each."""
        if self._in_turn:
            return np.concatenate([row.prefill() for row in self._alone()])
        return self._run_prompts(self.lengths[:, None] - 1)[:, 0]

    def prefill_all(self) -> Logits:
        """Run all prompts; the logits `[rows, longest, vocab]`, meaningless beyond a row's end."""
        if self._in_turn:
            longest = int(self.lengths.max())
            return np.concatenate(
                [
                    np.pad(row.prefill_all(), ((0, 0), (0, longest - int(row.lengths[0])), (0, 0)))
                    for row in self._alone()
                ]
            )
        return self._run_prompts(_EVERYWHERE)

    @property
    def _in_turn(self) -> bool:
        """Whether the prompts run one by one: a windowed cache takes no padded ones."""
        return self._decoder.windowed and len(set(self.lengths)) > 1

    def _alone(self) -> Iterator[Batch]:
        """Every row as a batch of its own, to be run; then its cache becomes this one's."""
        for row, prompt in enumerate(self._prompts):
            alone = Batch(self._decoder, [prompt], self._index[row : row + 1], self._adapters)
            yield alone
            for array, own in zip(self._arrays, alone._arrays, strict=True):
                array[row] = own[0]

    def _run_prompts(self, wanted: NDArray[np.int64]) -> Logits:
        positions = np.arange(self.lengths.max())
        ids = np.zeros((len(self._prompts), len(positions)), np.int64)
        for row, prompt in zip(ids, self._prompts, strict=True):
            row[: len(prompt)] = prompt
        self._mask = (positions < self.lengths[:, None]).astype(np.int64)
        return self._run(ids, np.tile(positions, (len(ids), 1)), wanted)

    def step(self, tokens: NDArray[np.int64]) -> Logits:
        """Add one token to every row; the logits `[rows, vocab]` after it."""
        self.lengths = self.lengths + 1
        if self._decoder.in_place:  # the token lies right behind its row's last
            self._mask = (np.arange(self.lengths.max()) < self.lengths[:, None]).astype(np.int64)
        else:  # the token lies behind the longest row's
            self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None], self.lengths[:, None] - 1, _EVERYWHERE)[:, 0]

    def _run(
        self, ids: NDArray[np.int64], positions: NDArray[np.int64], wanted: NDArray[np.int64]
    ) -> Logits:
        from onnxruntime import OrtValue

        binding = self._binding
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", self._mask)
        binding.bind_ortvalue_input(LOGITS_POSITIONS, OrtValue.ortvalue_from_numpy(wanted))
        if self._decoder.needs_positions:
            binding.bind_cpu_input("position_ids", positions)
        # Anew before every run, because their shapes are others than in the last.
        binding.bind_output("logits")
        growing = [] if self._decoder.in_place else self._decoder.cache
        for name in growing:
            binding.bind_output(f"present.{name}")
        self._session.run_with_iobinding(binding)
        logits, *grown = binding.get_outputs()  # in the order in which they were bound first
        if growing:
            for name, value in zip(growing, grown, strict=True):
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        result: Logits = logits.numpy().astype(np.float32, copy=False)
        return result
