"""One run of a decoder's graph over the slots of a continuous batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.files.onnx_files import ADAPTER_INDEX, LOGITS_POSITIONS, NO_ADAPTER

from .decoder_graph import DecoderGraph
from .slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sampling import Logits


class Runner:
    """Runs `graph` over `slots`: a piece of one row's prompt, or one token of many rows."""

    def __init__(self, graph: DecoderGraph, slots: Slots) -> None:
        self._graph, self._slots = graph, slots
        self._used: tuple[str, ...] = ()
        self._bindings: dict[str, tuple[Hashable, _Binding]] = {}

    def prefill(self, slot: int, tokens: Sequence[int], filled: int, adapter: str | None) -> Logits:
        """Add `tokens` behind the `filled` ones of `slot`; the logits `[vocab]` after the last."""
        used = () if adapter is None else (adapter,)
        binding = self._binding("prefill", slot, slot + 1, used)
        end = filled + len(tokens)
        ids = np.array([tokens], np.int64)
        mask = np.ones((1, end), np.int64)
        positions = np.arange(filled, end)[None]
        index = self._index([adapter], used)
        logits: Logits = binding.run(ids, mask, positions, index)[0, 0]
        return logits

    def step(
        self, tokens: Sequence[int], filled: Sequence[int], adapters: Sequence[str | None]
    ) -> Logits:
        """Add one token to each of the first slots; the logits `[rows, vocab]` after it."""
        used = self._stack(adapters)
        binding = self._binding("step", 0, len(tokens), used)
        ends = np.array(filled, np.int64)[:, None] + 1
        mask = (np.arange(ends.max()) < ends).astype(np.int64)
        ids = np.array(tokens, np.int64)[:, None]
        result: Logits = binding.run(ids, mask, ends - 1, self._index(adapters, used))[:, 0]
        return result

    def _stack(self, adapters: Sequence[str | None]) -> tuple[str, ...]:
        """The adapters to compute with: those of before as long as most are needed, since putting
        them side by side copies them."""
        needed = dict.fromkeys(name for name in adapters if name is not None)
        loaded = set(self._graph.adapters)
        kept = [name for name in self._used if name in loaded]
        if not needed.keys() <= set(kept) or len(kept) > 2 * len(needed):
            kept = [name for name in kept if name in needed]
            kept += [name for name in needed if name not in kept]
        self._used = tuple(kept)
        return self._used

    def _index(self, adapters: Sequence[str | None], used: tuple[str, ...]) -> NDArray[np.int64]:
        places = [NO_ADAPTER if name is None else used.index(name) for name in adapters]
        return np.array(places, np.int64)

    def _binding(self, kind: str, begin: int, end: int, used: tuple[str, ...]) -> _Binding:
        feeds = self._graph.adapter_set.stacked(used)
        key = (begin, end, self._slots.version, id(feeds))
        known = self._bindings.get(kind)
        if known is None or known[0] != key:
            known = (key, _Binding(self._graph, self._slots.view(begin, end), feeds))
            self._bindings[kind] = known
        return known[1]


class _Binding:
    """A graph bound to some slots (`cache`) and some adapters (`feeds`)."""

    def __init__(self, graph: DecoderGraph, cache: Sequence[Any], feeds: dict[str, Any]) -> None:
        from onnxruntime import OrtValue

        self._graph = graph
        self._feeds = feeds  # the binding reads the memory of these arrays
        self._binding = graph.session.io_binding()
        for name, value in zip(graph.cache, cache, strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        for name, array in feeds.items():
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        self._logits = len(graph.cache)

    def run(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        index: NDArray[np.int64],
    ) -> Logits:
        """The logits `[rows, 1, vocab]` behind the last of `ids [rows, length]`."""
        from onnxruntime import OrtValue

        binding = self._binding
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        if self._graph.needs_positions:
            binding.bind_cpu_input("position_ids", positions)
        if self._graph.adapter_set.batched:
            binding.bind_cpu_input(ADAPTER_INDEX, index)
        wanted = np.full((len(ids), 1), ids.shape[1] - 1)
        binding.bind_ortvalue_input(LOGITS_POSITIONS, OrtValue.ortvalue_from_numpy(wanted))
        binding.bind_output("logits")  # anew, because its shape is another than in the last run
        self._graph.session.run_with_iobinding(binding)
        result: Logits = binding.get_outputs()[self._logits].numpy()
        return result.astype(np.float32, copy=False)
