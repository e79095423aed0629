"""A decoder's graph bound to the memory of a cache and of some adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .decoder_graph import DecoderGraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sampling import Logits


class Binding:
    """`graph` over `cache`, an OrtValue per name in `graph.cache`, and the adapters' `feeds`.

    Keys and values are written into the cache where the graph does so (`in_place`); else the cache
    becomes what the graph hands back, which has grown.
    """

    def __init__(
        self, graph: DecoderGraph, cache: Sequence[Any], feeds: Mapping[str, NDArray[Any]]
    ) -> None:
        self._graph = graph
        self._feeds = feeds  # whose memory the binding reads
        self._binding = graph.session.inference.io_binding()
        self._binding.bind_output("logits")  # first, so that it comes first among the outputs
        for name, value in zip(graph.cache, cache, strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            if graph.in_place:
                self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._bind(feeds)

    def _bind(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        from onnxruntime import OrtValue

        for name, array in self._graph.session.taken(feeds).items():
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))

    def run(self, feeds: Mapping[str, NDArray[np.int64]]) -> Logits:
        """The logits `[rows, n, vocab]` where `feeds` want them."""
        self._bind(feeds)
        growing = [] if self._graph.in_place else self._graph.cache
        # Anew before every run, because their shapes are others than in the last.
        for name in ("logits", *(f"present.{name}" for name in growing)):
            self._binding.bind_output(name)
        self._graph.session.inference.run_with_iobinding(self._binding)
        logits, *grown = self._binding.get_outputs()
        for name, value in zip(growing, grown[: len(growing)], strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        result: Logits = logits.numpy().astype(np.float32, copy=False)
        return result
