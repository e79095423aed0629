"""A completion that was asked for, and what each step adds to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from .generation import Generation, Logprobs, PromptLogprobs

_numbers = itertools.count()


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
    """A completion asked for. `filled`: how many of its tokens the cache holds; `kind`: what these
    follow from beside the tokens; `cached`: how many were not computed, once it has begun."""

    def __init__(self, generation: Generation, adapter: str | None, tell: Tell) -> None:
        self.generation, self.adapter, self.tell = generation, adapter, tell
        self.number = next(_numbers)
        self.filled = 0
        self.kind = b""
        self.cached: int | None = None
        self.cancelled = False
        self._told_text = self._told_tokens = 0

    @property
    def length(self) -> int:
        return len(self.generation.prompt) + len(self.generation.tokens)

    @property
    def told(self) -> bool:
        """Whether the logits of the whole prompt are wanted."""
        return self.generation.sampling.prompt_logprobs is not None

    @property
    def whole(self) -> list[int]:
        """The tokens of the prompt and of the completion."""
        return [*self.generation.prompt, *self.generation.tokens]

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
