"""From an engine's thread to the event loop: what becomes of the choices of one request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from dora_serve.onnxruntime.request import Delta, Request
from dora_serve.onnxruntime.sampling import Sampling

from ..metrics import Metrics
from ..registry import Served, Writer
from ..wire.errors import ApiError

_LOGPROBS = 1 << 17  # of one request; each takes about 600 bytes


def check_count(engine: Writer, count: int) -> None:
    """Raise `ApiError` for a request of more choices than can ever wait."""
    if count > engine.limits.max_waiting:
        raise ApiError(f"{count} choices are more than can wait", code="too_many_choices")


def check_logprobs(count: int, tokens: int, top: int | None, param: str = "max_tokens") -> None:
    """Raise `ApiError` for more log-probabilities than an answer may hold."""
    if top is not None and count * tokens * (top + 1) > _LOGPROBS:
        raise ApiError(
            f"{count} choices of {tokens} tokens with {top} log-probabilities each are more than "
            f"{_LOGPROBS}",
            param=param,
            code="too_many_logprobs",
        )


class Asking:
    """Submits every prompt once per sampling and counts what comes back.

    Raises `QueueFull` or `EngineError` with nothing submitted.
    """

    def __init__(
        self,
        served: Served,
        engine: Writer,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sequence[Sampling]],
        metrics: Metrics,
        timeout: float,
    ) -> None:
        self.count = sum(map(len, samplings))
        check_count(engine, self.count)
        self._metrics, self._served = metrics, served
        self._begin = time.monotonic()
        self._deadline = self._begin + timeout
        self._last: dict[int, float] = {}
        self._news: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self.prompt_tokens = sum(map(len, prompts))
        self.tokens = 0
        self._requests: dict[int, Request] = {}
        self._begun: list[Request] = []  # the first of every prompt
        loop = asyncio.get_running_loop()

        def tell(choice: int, delta: Delta) -> None:
            loop.call_soon_threadsafe(self._news.put_nowait, (choice, delta))

        try:
            for prompt, draws in zip(prompts, samplings, strict=True):
                first = len(self._requests)
                tells = [partial(tell, first + i) for i in range(len(draws))]
                asked = engine.submit(prompt, served.model.adapter, draws, tells)
                self._requests.update(enumerate(asked, first))
                self._begun += asked[:1]
        except Exception:
            self.cancel()
            raise
        self._lengths = [0] * self.count
        self._prompts = [
            len(prompt) for prompt, draws in zip(prompts, samplings, strict=True) for _ in draws
        ]
        served.requests += 1
        metrics.asked(served.model, [len(prompt) for prompt in prompts])

    async def news(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Every choice's deltas as they come, until all have ended.

        Raises the error of a choice that failed, `ApiError` 504 when time is up; what has not ended
        by then, or when the caller goes, is cancelled.
        """
        try:
            while self._requests:
                try:
                    async with asyncio.timeout(self._deadline - time.monotonic()):
                        choice, delta = await self._news.get()
                except TimeoutError:
                    raise ApiError("the answer took too long", 504, code="timeout") from None
                if delta.error is not None:
                    del self._requests[choice]
                    raise delta.error
                self._measure(choice, delta)
                yield choice, delta
        finally:
            self.cancel()

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompts were not computed for this request."""
        return sum(request.cached or 0 for request in self._begun)

    def lengths(self, choice: int) -> tuple[int, int]:
        """How many tokens a choice's prompt has, and the choice so far."""
        return self._prompts[choice], self._lengths[choice]

    def cancel(self) -> None:
        """Let what has not ended go."""
        for request in self._requests.values():
            request.cancelled = True

    def _measure(self, choice: int, delta: Delta) -> None:
        now, metrics, model = time.monotonic(), self._metrics, self._served.model
        count = len(delta.steps)
        self.tokens += count
        self._lengths[choice] += count
        metrics.grew(model, count)
        if choice in self._last:
            metrics.between_tokens.labels(model.name).observe(now - self._last[choice])
        else:
            metrics.first_token.labels(model.name).observe(now - self._begin)
        self._last[choice] = now
        if delta.reason is not None:
            del self._requests[choice]
            metrics.answered(model, delta.reason, now - self._begin)
            metrics.length.labels(model.name).observe(self._lengths[choice])
