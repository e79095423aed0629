"""Beam search, as vLLM does it: every step asks for the likeliest tokens behind each beam."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import nlargest
from itertools import islice
from operator import itemgetter

from dora_serve.onnxruntime.generation import Logprobs, decoding
from dora_serve.onnxruntime.limits import QueueFull
from dora_serve.onnxruntime.request import Delta, Request, Tell
from dora_serve.onnxruntime.sampling import Sampling

from ..metrics import Metrics
from ..registry import Served, Writer
from ..wire.errors import ApiError
from ..wire.sampling import Generate
from .asking import Asking, check_count

_LONGEST = 512  # tokens of an answer
_PAUSE = 0.01  # seconds, while others wait


@dataclass(frozen=True)
class _Beam:
    """`told`: of every token and the end. `total`: the log-probability of all of it, its end too;
    `end`: the token that ended it."""

    tokens: tuple[int, ...] = ()
    told: tuple[Logprobs, ...] = ()
    total: float = 0.0
    end: int | None = None


class Searching:
    """For every prompt the `n` best of what `body` asks for, told at once when they are found.

    Raises `ApiError` for answers that may be too long.
    """

    def __init__(
        self,
        served: Served,
        engine: Writer,
        prompts: Sequence[Sequence[int]],
        body: Generate,
        most: int,
        top: int | None,
        metrics: Metrics,
        timeout: float,
    ) -> None:
        if most > _LONGEST:
            raise ApiError(
                f"beam search is for answers of {_LONGEST} tokens at most", param="max_tokens"
            )
        self.count = len(prompts) * body.n
        check_count(engine, self.count)
        self._served, self._engine, self._prompts = served, engine, prompts
        self._body, self._most, self._top, self._metrics = body, most, top, metrics
        self._begin = time.monotonic()
        self._deadline = self._begin + timeout
        self._requests: list[Request] = []
        self._lengths = [(0, 0)] * self.count
        self.prompt_tokens = sum(map(len, prompts))
        self.tokens = self.cached_tokens = 0
        served.requests += 1
        metrics.asked(served.model, [len(prompt) for prompt in prompts])

    async def news(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Every choice, whole. Raises as `Asking.news`."""
        try:
            for place, prompt in enumerate(self._prompts):
                try:
                    async with asyncio.timeout(self._deadline - time.monotonic()):
                        found = await self._search(prompt)
                except TimeoutError:
                    raise ApiError("the answer took too long", 504, code="timeout") from None
                for i, beam in enumerate(found, place * self._body.n):
                    delta = self._delta(beam)
                    self._lengths[i] = len(prompt), len(delta.tokens)
                    self._measure(delta)
                    yield i, delta
        finally:
            for request in self._requests:
                request.cancelled = True

    def lengths(self, choice: int) -> tuple[int, int]:
        """How many tokens a choice's prompt has, and the choice."""
        return self._lengths[choice]

    async def _search(self, prompt: Sequence[int]) -> list[_Beam]:
        width = self._body.n
        most = min(self._most, self._engine.room(prompt))
        running, ended = [_Beam()], list[_Beam]()
        ends = frozenset() if self._body.ignore_eos else self._ends

        def score(beam: _Beam) -> float:
            written = self._engine.begun(prompt) + len(beam.tokens)
            return beam.total / math.pow(max(written, 1), self._body.length_penalty)

        for _ in range(most):
            # Of ten thousands, most of which come to nothing: so they are no beams yet.
            found = [
                (beam.total + value, beam, token, best)
                for beam, (_, best) in zip(running, await self._step(prompt, running), strict=True)
                for token, value in best.items()
            ]
            new = [self._grown(*each, ended=True) for each in found if each[2] in ends]
            ended = nlargest(width, [*ended, *new], key=score)
            going = (each for each in found if each[2] not in ends)
            likeliest = nlargest(width, going, key=itemgetter(0))
            running = [self._grown(*each, ended=False) for each in likeliest]
            if not running:
                break
        return nlargest(width, [*ended, *running], key=score)

    def _grown(
        self, total: float, beam: _Beam, token: int, best: dict[int, float], ended: bool
    ) -> _Beam:
        """`beam` with one token more, or ended by it."""
        told = *beam.told, (best[token], dict(islice(best.items(), self._top or 0)))
        if ended:
            return _Beam(beam.tokens, told, total, token)
        return _Beam((*beam.tokens, token), told, total)

    @property
    def _ends(self) -> frozenset[int]:
        end = self._engine.end
        return self._engine.eos if end is None else frozenset((end,))

    async def _step(self, prompt: Sequence[int], beams: Sequence[_Beam]) -> list[Logprobs]:
        """What may come next behind every beam."""
        loop = asyncio.get_running_loop()
        told: list[asyncio.Future[Delta]] = [loop.create_future() for _ in beams]

        def tell(place: int, delta: Delta) -> None:
            loop.call_soon_threadsafe(_settle, told[place], delta)

        self._requests = []
        for place, beam in enumerate(beams):
            self._requests += await self._submit(prompt, beam, partial(tell, place))
            await asyncio.sleep(0)  # a hundred in one step would hold up others
        deltas = await asyncio.gather(*told)
        return [delta.logprobs[0] for delta in deltas]

    async def _submit(self, prompt: Sequence[int], beam: _Beam, tell: Tell) -> list[Request]:
        rules = self._served.defaults.search
        one = Sampling(
            max_tokens=1,
            ignore_eos=True,
            logprobs=2 * self._body.n,
            search=rules and replace(rules, beams=1),
        )
        adapter = self._served.model.adapter
        while True:
            try:
                return self._engine.submit(prompt, adapter, [one], [tell], beam.tokens)
            except QueueFull:
                if not beam.tokens:
                    raise
                await asyncio.sleep(_PAUSE)  # what was begun is finished

    def _delta(self, beam: _Beam) -> Delta:
        body, tokens = self._body, beam.tokens
        decode = decoding(self._engine.tokenizer, body.skip_special_tokens, body.marks)
        text = decode(list(tokens))
        if beam.end is not None and body.include_stop_str_in_output:
            tokens = (*tokens, beam.end)
        reason = "length" if beam.end is None else "stop"
        told = () if self._top is None else beam.told[: len(tokens)]
        return Delta(text, tokens, told, reason, stop_reason=beam.end)

    def _measure(self, delta: Delta) -> None:
        metrics, model = self._metrics, self._served.model
        self.tokens += len(delta.tokens)
        metrics.grew(model, len(delta.tokens))
        metrics.answered(model, delta.reason or "", time.monotonic() - self._begin)
        metrics.length.labels(model.name).observe(len(delta.tokens))


Answering = Asking | Searching


def _settle(future: asyncio.Future[Delta], delta: Delta) -> None:
    if future.done():
        return
    if delta.error is not None:
        future.set_exception(delta.error)
    else:
        future.set_result(delta)
