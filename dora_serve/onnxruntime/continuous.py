"""Continuous batching: requests join and leave a running batch between two steps.

One thread owns the graph. Every round it runs one piece of one new prompt, then one token of every
row, whatever their adapters: GroupQueryAttention takes a prompt by itself or single tokens of many
rows, and a piece bounds how long a prompt keeps the others waiting. A row's tokens do not depend
on its neighbours.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decoder_graph import DecoderGraph
from .engine import Engine
from .generation import Generation, Logprobs, PromptLogprobs
from .grammar import Grammars
from .limits import Limits, check_rows
from .runner import Runner
from .sampling import Sampling
from .session import EngineError
from .slots import Slots

if TYPE_CHECKING:
    from .sampling import Logits

_log = logging.getLogger(__name__)
_numbers = itertools.count()
_ALONE = 512  # tokens of a prompt at once when no row waits for it
_LOGITS = 1 << 23  # numbers, of a piece of a prompt all of whose tokens have logits


@dataclass(frozen=True)
class Delta:
    """What a step added to a request. `prompt_logprobs`: with the first one; `reason`,
    `stop_reason` and `end`: with the last, as `Generation` has them; `error`: it failed."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    reason: str | None = None
    error: Exception | None = None
    end: tuple[int, Logprobs | None] | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()

    @property
    def steps(self) -> list[tuple[int, Logprobs | None]]:
        """The tokens and the end, each with its log-probabilities where they are told."""
        told = self.logprobs or [None] * len(self.tokens)
        end = [] if self.end is None else [self.end]
        return [*zip(self.tokens, told, strict=True), *end]


Tell = Callable[[Delta], None]


class Request:
    """A completion asked for. `filled`: how many of its tokens the cache holds."""

    def __init__(self, generation: Generation, adapter: str | None, tell: Tell) -> None:
        self.generation, self.adapter, self.tell = generation, adapter, tell
        self.number = next(_numbers)
        self.filled = 0
        self.cancelled = False
        self._told_text = self._told_tokens = 0

    @property
    def length(self) -> int:
        return len(self.generation.prompt) + len(self.generation.tokens)

    def tell_news(self) -> None:
        """Tell what the generation has grown by since the last time."""
        done = self.generation
        text, tokens = done.text[self._told_text :], done.tokens[self._told_tokens :]
        logprobs = done.logprobs[self._told_tokens :]
        first = () if self._told_tokens else tuple(done.prompt_logprobs)
        self._told_text, self._told_tokens = len(done.text), len(done.tokens)
        self.tell(
            Delta(
                text,
                tuple(tokens),
                tuple(logprobs),
                done.reason,
                end=done.end,
                stop_reason=done.stop_reason,
                prompt_logprobs=first,
            )
        )


class ContinuousDecoder(Engine):
    """A decoder that many threads may ask at once.

    Raises `EngineError` for a graph whose cache is not written in place.
    """

    def __init__(self, graph: DecoderGraph, limits: Limits | None = None) -> None:
        if not graph.in_place:
            raise EngineError(
                "this graph's cache cannot be shared by rows that come and go",
                file=graph.folder,
                found="keys and values that are handed back",
                remedy="export it with --precision fp32, int8 or int4",
            )
        super().__init__(graph, limits, workers=1)
        self.graph = graph
        self.slots = Slots(graph, self.limits.max_rows, self.limits.cache_bytes)
        self.max_length = self.slots.max_length
        self.preemptions = 0
        # As vLLM: the tokenizer's own end, and those of the configuration, told by their id.
        own = frozenset(() if graph.end is None else (graph.end,))
        self.eos = graph.eos | own
        self._named = graph.eos - own if own else frozenset()
        self.grammars = Grammars(self.tokenizer, graph.vocabulary, self.eos)
        self._runner = Runner(graph, self.slots)
        self._rows: list[Request] = []  # by slot; each has one token that is not in the cache yet
        self._filling: Request | None = None  # in the slot behind them
        self._start()

    @property
    def _admitted(self) -> list[Request]:
        return [row for row in (*self._rows, self._filling) if row is not None]

    @property
    def running(self) -> int:
        return len(self._admitted)

    @property
    def cache_usage(self) -> float:
        """The share of the cache's bytes that rows have filled."""
        filled = sum(row.filled for row in self._admitted)
        return filled * self.slots.token_bytes / self.slots.max_bytes

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        samplings: Sequence[Sampling],
        tells: Sequence[Tell],
    ) -> list[Request]:
        """Queue one completion of `prompt` per sampling; each is told what becomes of it, from
        the decoder's thread.

        Raises `EngineError` for a prompt that is empty or too long, `QueueFull` when they would be
        too many, and then queues none.
        """
        check_rows([prompt], self.max_length - 1, self.graph.vocabulary)
        room, eos, named = self.max_length - len(prompt), self.eos, self._named
        requests = [
            Request(Generation(prompt, sampling, eos, self.tokenizer, room, named), adapter, tell)
            for sampling, tell in zip(samplings, tells, strict=True)
        ]
        self._accept(requests)
        return requests

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self.running or self._closing)
                if not self._queue and not self.running:
                    return
            try:
                self._round()
            except Exception as error:  # whoever waits must be told, and the next be served
                self._fail(error)

    def _round(self) -> None:
        self._drop_cancelled()
        if self._filling is None:
            self._admit()
        if self._filling is not None:
            self._fill(self._filling)
        self._restart()
        if self._rows:
            self._step()

    def _drop_cancelled(self) -> None:
        with self._changed:
            if any(request.cancelled for request in self._queue):
                self._queue = [each for each in self._queue if not each.cancelled]
        if self._filling is not None and self._filling.cancelled:
            self._leave_filling()
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].cancelled:
                self._leave(slot)

    def _restart(self) -> None:
        """Let every row that is about to cross the graph's border begin again: its keys and values
        are others beyond it."""
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].filled == self.graph.border:
                self._wait(self._leave(slot))

    def _admit(self) -> None:
        """Let the request that waits longest begin, as soon as the cache has room for it."""
        while self._queue:
            request = self._queue[0]
            longest = max(request.length, *(row.length for row in self._rows), 0)
            if not self.slots.fits(len(self._rows) + 1, min(longest + 1, self.max_length)):
                return
            try:
                if not self.pool.acquire(request.adapter):
                    return
                self._filling = request
                request.generation.begin()
            except Exception as error:
                request.tell(Delta(error=error))
            with self._changed:
                self._queue.pop(0)
            if self._filling is not None:
                return

    def _fill(self, request: Request) -> None:
        """Run the next piece of a prompt; with the last one it becomes a row."""
        tokens = [*request.generation.prompt, *request.generation.tokens]
        size = self.limits.piece if self._rows else _ALONE
        every = request.generation.sampling.prompt_logprobs is not None
        if every:
            size = max(1, min(size, _LOGITS // self.graph.vocabulary))
        piece = tokens[request.filled : request.filled + size]
        if not self._reserve(request.filled + len(piece)):
            self._preempt()
            return
        try:
            logits = self._runner.prefill(
                len(self._rows), piece, request.filled, len(tokens), request.adapter, every
            )
            if every:
                request.generation.read_prompt(logits, request.filled)
        except Exception as error:  # the rows beside it are not touched
            _log.exception("a prompt failed")
            self._leave_filling()
            request.tell(Delta(error=error))
            return
        request.filled += len(piece)
        if request.filled == len(tokens):
            self._rows.append(request)
            self._filling = None
            self._take(len(self._rows) - 1, logits[-1])

    def _step(self) -> None:
        while not self._reserve(max(row.filled for row in self._rows) + 1):
            self._preempt()
        logits = self._runner.step(
            [row.generation.tokens[-1] for row in self._rows],
            [row.filled for row in self._rows],
            [row.adapter for row in self._rows],
        )
        # From the last slot on, since a row that leaves is replaced by the last.
        for slot in reversed(range(len(self._rows))):
            self._rows[slot].filled += 1
            self._take(slot, logits[slot])

    def _take(self, slot: int, logits: Logits) -> None:
        request = self._rows[slot]
        try:
            request.generation.take(logits)
        except Exception as error:  # as when its logits are not finite; the others' are
            _log.exception("a token could not be drawn")
            request.tell(Delta(error=error))
            self._leave(slot)
            return
        request.tell_news()
        if request.generation.reason is not None:
            self._leave(slot)

    def _leave(self, slot: int) -> Request:
        """Take a row out; the last one moves into its slot, and the one being filled behind it."""
        left = self._rows[slot]
        self.pool.release(left.adapter)
        last = len(self._rows) - 1
        if slot != last:
            self._rows[slot] = self._rows[last]
            self.slots.move(last, slot, self._rows[slot].filled)
        self._rows.pop()
        if self._filling is not None:
            self.slots.move(last + 1, last, self._filling.filled)
        return left

    def _leave_filling(self) -> None:
        if self._filling is not None:
            self.pool.release(self._filling.adapter)
            self._filling = None

    def _reserve(self, length: int) -> bool:
        rows = self._admitted
        used = max(row.filled for row in rows)
        return self.slots.reserve(len(rows), max(length, used), used)

    def _preempt(self) -> None:
        """Let the youngest row wait for room: it begins again with the tokens it has."""
        request = self._filling
        if request is not None:
            self._leave_filling()
        else:
            request = self._leave(max(range(len(self._rows)), key=lambda i: self._rows[i].number))
        self.preemptions += 1
        self._wait(request)

    def _wait(self, request: Request) -> None:
        """Queue a request that has left, before all others, to begin again with its tokens."""
        request.filled = 0
        with self._changed:
            self._queue.insert(0, request)

    def _fail(self, error: Exception) -> None:
        """Tell every row that it failed; with no row, whoever waits longest."""
        _log.exception("a step failed")
        failed = self._admitted
        for request in failed:
            self.pool.release(request.adapter)
        self._rows, self._filling = [], None
        with self._changed:
            if not failed and self._queue:
                failed.append(self._queue.pop(0))
        for request in failed:
            request.tell(Delta(error=error))
