"""Continuous batching: requests join and leave a running batch between two steps.

One thread owns the graph. Every round it runs one piece of one new prompt, or as many short ones of
one adapter as are no longer than a piece together, then one token of every row, whatever their
adapters. GroupQueryAttention takes prompts from their begin, a prompt that goes on by itself, or
single tokens of many rows, and a piece bounds how long a prompt keeps the others waiting. A row's
tokens do not depend on its neighbours.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .decoder_graph import DecoderGraph
from .engine import Engine
from .generation import Generation
from .grammar import Grammars
from .limits import Limits, check_rows
from .prefixes import Prefixes
from .request import Delta, Request, Tell
from .runner import Runner
from .sampling import Sampling
from .session import EngineError
from .slots import Slots

if TYPE_CHECKING:
    from .sampling import Logits

_log = logging.getLogger(__name__)
_ALONE = 512  # tokens of a prompt at once when no row waits for it
_LOGITS = 1 << 23  # numbers, of a piece of a prompt all of whose tokens have logits


def _log_bug(what: str, error: Exception) -> None:
    """Log `error`, but not what a request asked for in vain: whoever asked is told."""
    if not isinstance(error, EngineError):
        _log.error(what, exc_info=error)


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
        self.graph, self.vocabulary = graph, graph.vocabulary
        self.slots = Slots(graph, self.limits.max_rows, self.limits.cache_bytes)
        self.max_length = self.slots.max_length
        self.preemptions = 0
        # As vLLM: the tokenizer's own end, and those of the configuration, told by their id.
        self.end = graph.end
        own = frozenset(() if self.end is None else (self.end,))
        self.eos = graph.eos | own
        self._named = graph.eos - own if own else frozenset()
        self.grammars = Grammars(self.tokenizer, graph.vocabulary, self.eos)
        self.prefixes = Prefixes(self.slots, self.limits.prefix_bytes)
        self._runner = Runner(graph, self.slots)
        self._rows: list[Request] = []  # by slot; each has one token that is not in the cache yet
        self._filling: list[Request] = []  # in the slots behind them
        self._start()

    @property
    def _admitted(self) -> list[Request]:
        return [*self._rows, *self._filling]

    @property
    def running(self) -> int:
        return len(self._admitted)

    @property
    def cache_usage(self) -> float:
        """The share of the cache's bytes that rows have filled."""
        filled = sum(row.filled for row in self._admitted)
        return filled * self.slots.token_bytes / self.slots.max_bytes

    def begun(self, prompt: Sequence[int]) -> int:
        """How many tokens the decoder has before an answer."""
        return len(prompt)

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow `prompt`."""
        return self.max_length - len(prompt)

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        samplings: Sequence[Sampling],
        tells: Sequence[Tell],
        written: Sequence[int] = (),
    ) -> list[Request]:
        """Queue one completion of `prompt` per sampling, behind what is `written` of it already;
        each is told what becomes of it, from the decoder's thread.

        Raises `EngineError` for a prompt that is empty or too long, `QueueFull` when they would be
        too many, and then queues none.
        """
        prompt = [*prompt, *written] if written else prompt
        check_rows([prompt], self.max_length - 1, self.graph.vocabulary)
        room, eos, named = self.room(prompt), self.eos, self._named
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
        if not self._filling:
            while self._queue and self._joins(self._queue[0]) and self._admit():
                pass
        if self._filling:
            self._fill()
        self._restart()
        if self._rows:
            self._step()

    def _drop_cancelled(self) -> None:
        with self._changed:
            if any(request.cancelled for request in self._queue):
                self._queue = [each for each in self._queue if not each.cancelled]
        for request in [each for each in self._filling if each.cancelled]:
            self._keep(self._admitted.index(request))
            self._leave_filling(request)
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].cancelled:
                self._keep(slot)
                self._leave(slot)

    def _restart(self) -> None:
        """Let the rows at the graph's border begin again: beyond it their keys are others."""
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].filled == self.graph.border:
                self._wait(self._leave(slot))

    def _joins(self, request: Request) -> bool:
        """Whether it can begin with those that begin now, as one piece."""
        together = [*self._filling, request]
        size = len(together) * max(each.length for each in together)
        fresh = not any(each.filled or each.told for each in together)
        alike = fresh and len({each.adapter for each in together}) == 1
        return not self._filling or (alike and size <= self.limits.piece)

    def _admit(self) -> bool:
        """Let the request that waits longest begin; False when there is no room for it yet."""
        request = self._queue[0]
        longest = max(request.length, *(row.length for row in self._admitted), 0)
        if not self.slots.fits(len(self._admitted) + 1, min(longest + 1, self.max_length)):
            return False
        try:
            if not self.pool.acquire(request.adapter):
                return False
            self._filling.append(request)
            request.generation.begin()
            self._recall(request)
        except Exception as error:
            if request in self._filling:
                self._leave_filling(request)
            request.tell(Delta(error=error))
        with self._changed:
            self._queue.pop(0)
        return True

    def _recall(self, request: Request) -> None:
        """Begin a prompt with what was kept of one that began like it."""
        if self.prefixes.kept:
            beyond = self.graph.border is not None and request.length > self.graph.border
            request.kind = self.graph.adapter_set.digest(request.adapter) + bytes([beyond])
            if not request.told and self._reserve(request.length):
                slot = self._admitted.index(request)
                request.filled = self.prefixes.load(request.kind, request.whole, slot)
        if request.cached is None:
            request.cached = request.filled

    def _keep(self, slot: int) -> None:
        """Keep what a row, or the prompt behind them, has computed."""
        request = self._admitted[slot]
        if self.prefixes.kept:
            self.prefixes.keep(request.kind, request.whole[: request.filled], slot)

    def _fill(self) -> None:
        """Run the next piece of a prompt, or whole ones; with the last it becomes a row."""
        begin = list(itertools.takewhile(lambda each: not each.filled, self._filling))
        if len(begin) > 1:
            self._fill_all(begin)
            return
        request = self._filling[0]
        tokens, every = request.whole, request.told
        size = self.limits.piece if self._rows else _ALONE
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
            self._refuse([request], error)
            return
        request.filled += len(piece)
        if request.filled == len(tokens):
            self._become_rows(logits[-1:])

    def _fill_all(self, requests: Sequence[Request]) -> None:
        """Run the whole prompts of the first that fill, which have one adapter."""
        if not self._reserve(max(each.length for each in requests)):
            self._preempt()
            return
        prompts = [each.whole for each in requests]
        try:
            logits = self._runner.prefill_all(len(self._rows), prompts, requests[0].adapter)
        except Exception as error:
            self._refuse(requests, error)
        else:
            for request in requests:
                request.filled = request.length
            self._become_rows(logits)

    def _become_rows(self, logits: Logits) -> None:
        """Let the first that filled be rows; each takes its token from `logits [n, vocab]`."""
        first, count = len(self._rows), len(logits)
        self._rows += self._filling[:count]
        del self._filling[:count]
        for slot in reversed(range(first, first + count)):  # as in a step
            request = self._rows[slot]
            self._take(slot, logits[slot - first])
            if request in self._rows:  # its first token is told before it is kept
                self._keep(slot)

    def _refuse(self, requests: Sequence[Request], error: Exception) -> None:
        _log_bug("a prompt failed", error)
        for request in requests:
            self._leave_filling(request)
            request.tell(Delta(error=error))

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
            _log_bug("a token could not be drawn", error)
            request.tell(Delta(error=error))
            self._leave(slot)
            return
        request.tell_news()
        if request.generation.reason is not None:
            self._keep(slot)
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
        self._close_up(last)
        return left

    def _leave_filling(self, request: Request) -> None:
        slot = self._admitted.index(request)
        self.pool.release(request.adapter)
        self._filling.remove(request)
        self._close_up(slot)

    def _close_up(self, slot: int) -> None:
        """Let those that fill behind `slot`, which was left, move up by one."""
        for target in range(slot, len(self._admitted)):
            self.slots.move(target + 1, target, self._admitted[target].filled)

    def _reserve(self, length: int) -> bool:
        rows = self._admitted
        used = max(row.filled for row in rows)
        return self.slots.reserve(len(rows), max(length, used), used)

    def _preempt(self) -> None:
        """Let the youngest row wait for room: it begins again with the tokens it has."""
        if self._filling:
            request = self._filling[-1]
            self._keep(len(self._admitted) - 1)
            self._leave_filling(request)
        else:
            youngest = max(range(len(self._rows)), key=lambda i: self._rows[i].number)
            self._keep(youngest)
            request = self._leave(youngest)
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
        self._rows, self._filling = [], []
        with self._changed:
            if not failed and self._queue:
                failed.append(self._queue.pop(0))
        for request in failed:
            request.tell(Delta(error=error))
