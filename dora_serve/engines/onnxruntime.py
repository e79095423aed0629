"""Decoders in ONNX Runtime: one process, no torch, another adapter in every row of a batch.

>>> from dora_serve.engines.onnxruntime import Decoder
>>> decoder = Decoder("onnx/")
>>> for done in decoder.generate(["count : nine"] * 2, adapters=[None, "count-down"]):
...     print(done.text)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.json_files import read_json
from converters.onnx_files import ADAPTER_INDEX, NO_ADAPTER

from .adapter_set import AdapterSet
from .sampling import Sampling, draw, log_softmax
from .session import EngineError, OnnxFolder, open_adaptable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

Prompt = str | Sequence[int]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Completion:
    """One finished row. `logprobs`: at every step the log-probability of the token drawn, and the
    likeliest tokens with theirs. `reason`: "stop" or "length"."""

    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = "length"
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)


class Decoder(OnnxFolder):
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
        super().__init__(folder)
        settings: Any = read_json(self.folder / "genai_config.json")
        config = settings["model"]
        layers = config["decoder"]["num_hidden_layers"]
        self._cache = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        self._heads: int = config["decoder"]["num_key_value_heads"]
        self._head_size: int = config["decoder"]["head_size"]
        ends = config["eos_token_id"]
        self.eos: frozenset[int] = frozenset(ends if isinstance(ends, list) else [ends])
        self.max_length: int = max_length or config["context_length"]
        self.max_rows = max_rows
        self._session = open_adaptable(self.folder, threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._windowed = "sliding_window" in config["decoder"]
        self._needs_positions = "position_ids" in inputs
        self._in_place: bool = settings["search"]["past_present_share_buffer"]
        self._cache_type = _TYPES[inputs["past_key_values.0.key"].type]
        self._set = AdapterSet(self._session)
        self._set.add_all(self.folder)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._set.names

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an `.onnx_adapter` file under `name`, in place of an earlier one of that name."""
        self._set.add(name, Path(path))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; the graph and the session stay as they are."""
        self._set.remove(name)

    def batch(self, prompts: Sequence[Sequence[int]], adapters: Iterable[str | None]) -> Batch:
        """Begin a batch of token rows, each with an adapter or with none."""
        wanted = list(adapters)
        if len(wanted) != len(prompts) or not prompts:
            raise EngineError(
                "one adapter (or None) per prompt", found=len(wanted), expected=len(prompts)
            )
        self._set.check(wanted)
        if len(prompts) > self.max_rows:
            raise EngineError(
                "more rows than the cache holds",
                found=len(prompts),
                expected=f"at most {self.max_rows}",
            )
        used = tuple(dict.fromkeys(name for name in wanted if name is not None))
        index = [NO_ADAPTER if name is None else used.index(name) for name in wanted]
        return Batch(self, prompts, np.array(index, np.int64), self._set.stacked(used))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, special tokens included; ids stay as they are."""
        return list(self.tokenizer.encode(prompt).ids) if isinstance(prompt, str) else list(prompt)

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
        done = [Completion(row) for row in rows]
        # Every row has a generator of its own, so that its draws do not depend on its neighbours.
        generators = [np.random.default_rng(sampling.seed) for _ in rows]
        running = set(range(len(rows)))
        logits = batch.prefill()
        for _ in range(min(sampling.max_tokens, self.max_length - max(map(len, rows)))):
            tokens = np.zeros(len(rows), np.int64)
            for row in sorted(running):
                tokens[row] = draw(logits[row], sampling, generators[row])
                if self._take(done[row], int(tokens[row]), logits[row], sampling):
                    running.discard(row)
            if not running:
                break
            logits = batch.step(tokens)
        for row in running:
            done[row].text = self.tokenizer.decode(done[row].tokens)
        return done

    def _take(self, row: Completion, token: int, logits: Logits, sampling: Sampling) -> bool:
        """Add `token` to the row; whether that ends it."""
        if token in self.eos and not sampling.ignore_eos:
            row.reason, row.text = "stop", self.tokenizer.decode(row.tokens)
            return True
        row.tokens.append(token)
        if sampling.logprobs is not None:
            logprobs = log_softmax(logits)
            best = np.argsort(-logprobs, kind="stable")[: sampling.logprobs]
            row.logprobs.append(
                (float(logprobs[token]), {int(i): float(logprobs[i]) for i in best})
            )
        if sampling.stop:
            text = self.tokenizer.decode(row.tokens)
            ends = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
            if ends:
                row.reason, row.text = "stop", text[: min(ends)]
                return True
        return False


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
        self._decoder, self._session = decoder, decoder._session
        # The binding reads the memory of these arrays, so they live as long as the batch.
        self._prompts, self._index, self._adapters = prompts, index, adapters
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        self._rows = np.arange(len(prompts))
        self._mask = np.zeros((len(prompts), 0), np.int64)
        length = decoder.max_length if decoder._in_place else 0
        shape = (len(prompts), decoder._heads, length, decoder._head_size)
        self._binding = self._session.io_binding()
        self._binding.bind_output("logits")
        self._arrays = [np.zeros(shape, decoder._cache_type) for _ in decoder._cache]
        for name, array in zip(decoder._cache, self._arrays, strict=True):
            value = OrtValue.ortvalue_from_numpy(array)  # over the same memory
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            if decoder._in_place:
                self._binding.bind_ortvalue_output(f"present.{name}", value)
        if decoder._set.batched:
            self._binding.bind_cpu_input(ADAPTER_INDEX, index)
        for name, array in adapters.items():
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))

    def prefill(self) -> Logits:
        """Run all prompts; the logits `[rows, vocab]` after the last token of each."""
        last: Logits = self.prefill_all()[self._rows, self.lengths - 1]
        return last

    def prefill_all(self) -> Logits:
        """Run all prompts; the logits `[rows, longest, vocab]`, meaningless beyond a row's end."""
        if self._decoder._windowed and len(set(self.lengths)) > 1:
            return self._prefill_in_turn()
        positions = np.arange(self.lengths.max())
        ids = np.zeros((len(self._prompts), len(positions)), np.int64)
        for row, prompt in zip(ids, self._prompts, strict=True):
            row[: len(prompt)] = prompt
        self._mask = (positions < self.lengths[:, None]).astype(np.int64)
        return self._run(ids, np.tile(positions, (len(ids), 1)))

    def _prefill_in_turn(self) -> Logits:
        """As `prefill_all`, row by row: a windowed cache takes no padded prompts."""
        result: Logits | None = None
        for row, prompt in enumerate(self._prompts):
            alone = Batch(self._decoder, [prompt], self._index[row : row + 1], self._adapters)
            logits = alone.prefill_all()[0]
            if result is None:
                result = np.zeros(
                    (len(self._rows), self.lengths.max(), logits.shape[1]), np.float32
                )
            result[row, : len(prompt)] = logits
            for array, own in zip(self._arrays, alone._arrays, strict=True):
                array[row] = own[0]
        assert result is not None
        return result

    def step(self, tokens: NDArray[np.int64]) -> Logits:
        """Add one token to every row; the logits `[rows, vocab]` after it."""
        self.lengths = self.lengths + 1
        if self._decoder._in_place:  # the token lies right behind its row's last
            self._mask = (np.arange(self.lengths.max()) < self.lengths[:, None]).astype(np.int64)
        else:  # the token lies behind the longest row's
            self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None], self.lengths[:, None] - 1)[:, 0]

    def _run(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Logits:
        binding = self._binding
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", self._mask)
        if self._decoder._needs_positions:
            binding.bind_cpu_input("position_ids", positions)
        # Anew before every run, because their shapes are others than in the last.
        binding.bind_output("logits")
        growing = [] if self._decoder._in_place else self._decoder._cache
        for name in growing:
            binding.bind_output(f"present.{name}")
        self._session.run_with_iobinding(binding)
        logits, *grown = binding.get_outputs()  # in the order in which they were bound first
        if growing:
            for name, value in zip(growing, grown, strict=True):
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        result: Logits = logits.numpy().astype(np.float32, copy=False)
        return result
