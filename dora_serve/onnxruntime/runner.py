"""One run of a decoder's graph over the slots of a continuous batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from converters.files.onnx_files import ADAPTER_INDEX, LOGITS_POSITIONS, ROW_LENGTHS

from .adapter_set import row_index
from .binding import Binding
from .decoder_graph import DecoderGraph
from .session import padded
from .slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sampling import Logits


class Runner:
    """Runs `graph` over `slots`: a piece of one row's prompt, whole prompts that begin
    together, or one token of many rows."""

    def __init__(self, graph: DecoderGraph, slots: Slots) -> None:
        self._graph, self._slots = graph, slots
        self._used: tuple[str, ...] = ()
        self._bindings: dict[str, tuple[Hashable, Binding]] = {}

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        filled: int,
        length: int,
        adapter: str | None,
        every: bool = False,
    ) -> Logits:
        """Add `tokens` behind the `filled` ones of `slot`, which will hold `length` in the end; the
        logits `[1, vocab]` after the last, or `[n, vocab]` after every one of them."""
        used = () if adapter is None else (adapter,)
        binding = self._binding("prefill", slot, slot + 1, used)
        positions = np.arange(filled, filled + len(tokens))[None]
        wanted = np.arange(0 if every else len(tokens) - 1, len(tokens))[None]
        ids, ends = np.array([tokens]), positions[:, -1:] + 1
        logits: Logits = self._run(binding, ids, positions, ends, wanted, [adapter], used, length)
        own: Logits = logits[0]
        return own

    def prefill_all(self, slot: int, rows: Sequence[Sequence[int]], adapter: str | None) -> Logits:
        """Begin the slots from `slot` on with whole prompts; the logits `[rows, vocab]` after the
        last token of each."""
        used = () if adapter is None else (adapter,)
        binding = self._binding("prefill", slot, slot + len(rows), used)
        ids, ends = padded(rows, 0), np.array([[len(row)] for row in rows])
        positions = np.tile(np.arange(ids.shape[1]), (len(rows), 1))
        return self._run(binding, ids, positions, ends, ends - 1, [adapter] * len(rows), used)[:, 0]

    def step(
        self, tokens: Sequence[int], filled: Sequence[int], adapters: Sequence[str | None]
    ) -> Logits:
        """Add one token to each of the first slots; the logits `[rows, vocab]` after it."""
        used = self._stack(adapters)
        binding = self._binding("step", 0, len(tokens), used)
        ids, positions = np.array(tokens)[:, None], np.array(filled)[:, None]
        wanted, ends = np.zeros_like(ids), positions + 1
        return self._run(binding, ids, positions, ends, wanted, adapters, used)[:, 0]

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

    def _binding(self, kind: str, begin: int, end: int, used: tuple[str, ...]) -> Binding:
        feeds = self._graph.adapter_set.stacked(used)
        key = (begin, end, self._slots.version, id(feeds))
        known = self._bindings.get(kind)
        if known is None or known[0] != key:
            known = (key, Binding(self._graph, self._slots.view(begin, end), feeds))
            self._bindings[kind] = known
        return known[1]

    def _run(
        self,
        binding: Binding,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        ends: NDArray[np.int64],
        wanted: NDArray[np.int64],
        adapters: Sequence[str | None],
        used: tuple[str, ...],
        length: int = 0,
    ) -> Logits:
        """The logits `[rows, m, vocab]` after those of `ids [rows, n]` at `positions` that are
        `wanted [rows, m]`, in rows that end at `ends [rows, 1]` and get at least `length` tokens.
        """
        feeds = {
            "input_ids": ids,
            "attention_mask": (np.arange(ends.max()) < ends).astype(np.int64),
            "position_ids": positions,
            ROW_LENGTHS: np.array([length]),
            LOGITS_POSITIONS: wanted,
            ADAPTER_INDEX: row_index(adapters, used),
        }
        return binding.run(feeds)
