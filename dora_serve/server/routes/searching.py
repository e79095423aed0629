"""Beam search, as vLLM does it: every step asks for the likeliest tokens behind each beam."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial

from dora_serve.onnxruntime.generation import Logprobs
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
    """`total`: the log-probability of all of it, its end too; `end`: the token that ended it."""

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
        for _ in range(most):
            grown = [
                _Beam((*beam.tokens, token), (*beam.told, step), beam.total + value)
                for beam, step in zip(running, await self._step(prompt, running), strict=True)
                for token, value in step[1].items()
            ]
            ends = frozenset() if self._body.ignore_eos else self._ends
            ended += [
                _Beam(each.tokens[:-1], each.told, each.total, each.tokens[-1])
                for each in grown
                if each.tokens[-1] in ends
            ]
            going = [each for each in grown if each.tokens[-1] not in ends]
            running = sorted(going, key=lambda each: -each.total)[:width]
            if not running:
                break

        def score(beam: _Beam) -> float:
            written = self._engine.begun(prompt) + len(beam.tokens)
            return beam.total / math.pow(max(written, 1), self._body.length_penalty)

        return sorted([*ended, *running], key=score, reverse=True)[:width]

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
        deltas = await asyncio.gather(*told)
        return [delta.logprobs[0] for delta in deltas]

    async def _submit(self, prompt: Sequence[int], beam: _Beam, tell: Tell) -> list[Request]:
        one = Sampling(max_tokens=1, ignore_eos=True, logprobs=2 * self._body.n)
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
        decode = self._engine.tokenizer.decode
        text = decode(list(tokens), skip_special_tokens=body.skip_special_tokens)
        if beam.end is not None and body.include_stop_str_in_output:
            tokens = (*tokens, beam.end)
        top = self._top or 0
        steps = [
            (best[token], dict(list(best.items())[:top]))
            for token, (_, best) in zip(tokens, beam.told, strict=False)
        ]
        reason = "length" if beam.end is None else "stop"
        told = () if self._top is None else tuple(steps)
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
