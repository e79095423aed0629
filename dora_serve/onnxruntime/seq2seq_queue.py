"""Encoder-decoders that many threads may ask at once.

The prompts that wait are read together, and written together, a token of every row at a time. Those
that come meanwhile begin beside them, in a group of their own, since the caches of a group are of
one length. A row's tokens do not depend on its neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .beams import forbidden
from .engine import Engine
from .generation import Generation
from .grammar import Grammars
from .limits import Limits, check_rows, longest_row, takes_much
from .request import Delta, Request, Tell
from .seq2seq import Batch, Seq2Seq
from .session import EngineError

if TYPE_CHECKING:
    from .beams import Search
    from .sampling import Logits, Sampling

_log = logging.getLogger(__name__)
_LOGITS = 1 << 24  # numbers, of tokens that a decoder begins with: each of them has logits


@dataclass(eq=False)
class _Row:
    """`written`: what the decoder is to have written before."""

    source: Sequence[int]
    written: Sequence[int]
    request: Request

    @property
    def search(self) -> Search | None:
        """How its answer is looked for by beams; None where it is drawn."""
        found = self.request.generation.sampling.search
        return None if found is None or found.beams == 1 else found

    @property
    def width(self) -> int:
        """How many rows of a batch it takes."""
        return 1 if self.search is None else self.search.beams

    def alike(self, other: _Row) -> bool:
        """Whether both may be of one group, as far as it is about what is written."""
        return len(self.written) == len(other.written) and self.search == other.search


@dataclass(eq=False)
class _Group:
    """`begun`: how many of the tokens that the decoder begins with it has run; `steps`: those of a
    search by beams."""

    rows: list[_Row]
    batch: Batch
    begun: int = 0
    steps: Iterator[list[list[int]] | None] | None = None


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
        room = longest_row(self.limits.row_bytes, model.config)
        self.max_length = min(longest or model.max_length, model.max_length, room)
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
        return sum(row.width for group in self._groups for row in group.rows)

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
        """As `ContinuousDecoder.submit`; `prompt` is what the encoder reads. Raises `EngineError`
        too for beams whose keys and values alone are more than are kept."""
        check_rows([prompt], self.max_length, self.vocabulary)
        begin = [self.model.start, *written]
        check_rows([begin], self.max_length, self.vocabulary)
        rows = []
        for sampling, tell in zip(samplings, tells, strict=True):
            room = self.max_length - len(written)
            done = Generation(begin, sampling, self.eos, self.tokenizer, room, self._named)
            row = _Row(prompt, written, Request(done, adapter, tell))
            if row.width > 1 and self._bytes(row) > self.limits.cache_bytes:
                raise EngineError(
                    "the beams of this answer take more than the keys and values that are kept",
                    found=f"{row.width} beams, {self._bytes(row)} bytes",
                    expected=f"at most {self.limits.cache_bytes}",
                    remedy="ask for fewer max_tokens, or with a temperature, which has no beams",
                )
            rows.append(row)
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
                    (self._step if group.steps is None else self._search)(group)
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
            search, steps = ready[0].search, None
            if search is not None:
                steps = self.model.steps(batch, search, self.eos)
            self._groups.append(_Group(ready, batch, steps=steps))

    def _fitting(self) -> list[_Row]:
        """Those alike the one that waits longest: none is padded to more than twice its length,
        and what the decoder wrote before is as long."""
        left = self.limits.max_rows - self.running
        begun = bool(self._groups)
        size = sum(map(self._bytes, (row for group in self._groups for row in group.rows)))
        found: list[_Row] = []
        for row in self._queue:
            lengths = [len(each.source) for each in (*found, row)]
            larger, fewer = size + self._bytes(row), left - row.width
            if (fewer < 0 or larger > self.limits.cache_bytes) and (found or begun):
                break
            if found and takes_much(len(lengths), max(lengths), self.model.config):
                break
            if max(lengths) <= 2 * min(lengths) + 8 and (not found or row.alike(found[0])):
                found.append(row)
                size, left = larger, fewer
        return found

    def _bytes(self, row: _Row) -> int:
        """Of keys and values, once it has all its tokens."""
        most = min(row.request.generation.sampling.max_tokens, self.max_length)
        tokens = len(row.source) + len(row.written) + most
        return tokens * self.model.token_bytes * row.width

    def _search(self, group: _Group) -> None:
        assert group.steps is not None
        if all(row.request.cancelled for row in group.rows):
            found: list[list[int]] | None = [[] for _ in group.rows]
        else:
            found = next(group.steps)
        if found is None:
            return
        forces = self.model.forced_end is not None
        for row, tokens in zip(group.rows, found, strict=True):
            done = row.request.generation
            if not row.request.cancelled:
                done.found(tokens, self.eos, forced=forces and len(tokens) == done.limit)
                row.request.tell_news()
            self._end(row)
        group.rows = []

    def _step(self, group: _Group) -> None:
        logits = self._logits(group)
        going = []
        for place, row in enumerate(group.rows):
            done = row.request.generation
            if row.request.cancelled:
                self._end(row)
                continue
            if logits is None:
                going.append(place)
                continue
            try:
                done.take(self._heeding(row, logits[place]))
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

    def _logits(self, group: _Group) -> Logits | None:
        """Those after every row's last token; None while what a decoder begins with is not run to
        its end: of that as much at once as has not too many of them."""
        begin = np.array([row.request.generation.prompt for row in group.rows], np.int64)
        rows, length = begin.shape
        logits: Logits
        if group.begun == length:
            last = [row.request.generation.tokens[-1] for row in group.rows]
            logits = group.batch.step(np.array(last, np.int64))
        elif group.begun:
            logits = group.batch.step(begin[:, group.begun])
            group.begun += 1
        else:
            group.begun = min(length, max(1, _LOGITS // (rows * self.vocabulary)))
            logits = group.batch.begin(begin[:, : group.begun])[:, -1]
        return logits if group.begun == length else None

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
        said, search = row.request.whole, sampling.search
        never = model.never(said, len(said) - 1)
        if search is not None:
            never += forbidden(said, len(said) - 1, row.source, search, self.eos)
        if never:
            logits = logits.copy()
            logits[never] = -np.inf
        return logits

    def _end(self, row: _Row, error: Exception | None = None) -> None:
        self.pool.release(row.request.adapter)
        if error is not None:
            row.request.tell(Delta(error=error))
