"""Encoder-decoders that many threads may ask at once.

The prompts that wait are read together, and written together, a token of every row at a time. Those
that come meanwhile begin beside them, in a group of their own, since the caches of a group are of
one length. A row's tokens do not depend on its neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .engine import Engine
from .generation import Generation
from .grammar import Grammars
from .limits import Limits, check_rows, takes_much
from .request import Delta, Request, Tell
from .seq2seq import Batch, Seq2Seq

if TYPE_CHECKING:
    from .sampling import Logits, Sampling

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Row:
    """`written`: what the decoder is to have written before."""

    source: Sequence[int]
    written: Sequence[int]
    request: Request


@dataclass(eq=False)
class _Group:
    rows: list[_Row]
    batch: Batch
    begun: bool = False


class Seq2SeqQueue(Engine):
    """`longest`: tokens of a prompt, and of an answer; None for as many as the model takes. `ends`:
    the tokens that end an answer, None for those of the model."""

    def __init__(
        self,
        model: Seq2Seq,
        limits: Limits | None = None,
        longest: int | None = None,
        ends: frozenset[int] | None = None,
    ) -> None:
        super().__init__(model, limits, workers=1)
        self.model, self.vocabulary = model, model.vocabulary
        self.max_length = min(longest or model.max_length, model.max_length)
        self.end = model.end
        own = frozenset(() if self.end is None else (self.end,))
        said = model.eos if ends is None else ends
        self.eos = said | own
        self._named = said - own if own else frozenset()
        self.grammars = Grammars(self.tokenizer, self.vocabulary, self.eos)
        self._groups: list[_Group] = []
        self._start()

    @property
    def running(self) -> int:
        return sum(len(group.rows) for group in self._groups)

    def begun(self, prompt: Sequence[int]) -> int:  # noqa: ARG002
        """How many tokens the decoder has before an answer."""
        return 1

    def room(self, prompt: Sequence[int]) -> int:  # noqa: ARG002
        """How many tokens an answer may have."""
        return self.max_length

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        samplings: Sequence[Sampling],
        tells: Sequence[Tell],
        written: Sequence[int] = (),
    ) -> list[Request]:
        """As `ContinuousDecoder.submit`; `prompt` is what the encoder reads."""
        check_rows([prompt], self.max_length, self.vocabulary)
        begin = [self.model.start, *written]
        check_rows([begin], self.max_length, self.vocabulary)
        rows = []
        for sampling, tell in zip(samplings, tells, strict=True):
            room = self.max_length - len(written)
            done = Generation(begin, sampling, self.eos, self.tokenizer, room, self._named)
            rows.append(_Row(prompt, written, Request(done, adapter, tell)))
        self._accept(rows)
        return [row.request for row in rows]

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._groups or self._closing)
                if not self._queue and not self._groups:
                    return
            self._begin()
            for group in self._groups:
                try:
                    self._step(group)
                except Exception as error:  # whoever waits must be told, and the next be served
                    _log.exception("a step failed")
                    for row in group.rows:
                        self._end(row, error)
                    group.rows = []
            self._groups = [group for group in self._groups if group.rows]

    def _begin(self) -> None:
        """Let those that wait, and are alike, begin together as far as there is room."""
        with self._changed:
            self._queue = [row for row in self._queue if not row.request.cancelled]
            rows = self._fitting()
        ready = []
        for row in rows:
            try:
                if not self.pool.acquire(row.request.adapter):
                    continue
            except Exception as error:
                row.request.tell(Delta(error=error))
            else:
                ready.append(row)
            with self._changed:
                self._queue.remove(row)
        if not ready:
            return
        try:
            batch = self.model.batch(
                [row.source for row in ready], [row.request.adapter for row in ready]
            )
        except Exception as error:
            _log.exception("prompts failed")
            for row in ready:
                self._end(row, error)
        else:
            self._groups.append(_Group(ready, batch))

    def _fitting(self) -> list[_Row]:
        """Those alike the one that waits longest: none is padded to more than twice its length,
        and what the decoder wrote before is as long."""
        left = self.limits.max_rows - self.running
        size = sum(map(self._bytes, (row for group in self._groups for row in group.rows)))
        found: list[_Row] = []
        for row in self._queue:
            lengths = [len(each.source) for each in (*found, row)]
            size += self._bytes(row)
            if len(found) == left or (size > self.limits.cache_bytes and (found or self._groups)):
                break
            if found and takes_much(len(lengths), max(lengths), self.model.config):
                break
            if max(lengths) <= 2 * min(lengths) + 8 and (
                not found or len(row.written) == len(found[0].written)
            ):
                found.append(row)
        return found

    def _bytes(self, row: _Row) -> int:
        """Of keys and values, once it has all its tokens."""
        most = min(row.request.generation.sampling.max_tokens, self.max_length)
        tokens = len(row.source) + len(row.written) + most
        return tokens * self.model.token_bytes

    def _step(self, group: _Group) -> None:
        if group.begun:
            last = [row.request.generation.tokens[-1] for row in group.rows]
            logits = group.batch.step(np.array(last, np.int64))
        else:
            begin = [row.request.generation.prompt for row in group.rows]
            logits = group.batch.begin(np.array(begin, np.int64))[:, -1]
            group.begun = True
        going = []
        for place, (row, values) in enumerate(zip(group.rows, logits, strict=True)):
            done = row.request.generation
            if row.request.cancelled:
                self._end(row)
                continue
            try:
                done.take(self._heeding(row, values))
            except Exception as error:  # as when its logits are not finite; the others' are
                self._end(row, error)
                continue
            row.request.tell_news()
            if done.reason is None:
                going.append(place)
            else:
                self._end(row)
        if going and len(going) < len(group.rows):
            group.batch.keep(np.array(going))
        group.rows = [group.rows[place] for place in going]

    def _heeding(self, row: _Row, logits: Logits) -> Logits:
        """The logits of what the model's configuration lets an answer begin and go on with, where
        the request does not say it."""
        sampling, model = row.request.generation.sampling, self.model
        if sampling.grammar is not None or sampling.allowed_token_ids:
            return logits
        begins = len(row.request.whole) == 1
        if begins and model.forced is not None:
            alone = np.full_like(logits, -np.inf)
            alone[model.forced] = 0
            return alone
        if never := model.never(begins):
            logits = logits.copy()
            logits[never] = -np.inf
        return logits

    def _end(self, row: _Row, error: Exception | None = None) -> None:
        self.pool.release(row.request.adapter)
        if error is not None:
            row.request.tell(Delta(error=error))
