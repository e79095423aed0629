"""One completion as it grows: its tokens, their text, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .sampling import Sampling, draw, likeliest, log_softmax

if TYPE_CHECKING:
    from .sampling import Logits

Logprobs = tuple[float, dict[int, float]]


class Generation:
    """What a row's logits became so far. `reason`: None while it goes on, then "stop" or "length".

    `logprobs`: at every step the log-probability of the token drawn, and the likeliest tokens with
    theirs. `room`: how many tokens the model's context leaves behind the prompt.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        eos: frozenset[int],
        tokenizer: Any,
        room: int,
    ) -> None:
        # A prompt is not copied for each of many that complete it.
        self.prompt = prompt if isinstance(prompt, list) else list(prompt)
        self.sampling = sampling
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.reason: str | None = None
        self._limit = min(sampling.max_tokens, room)
        self._eos = eos
        self._generator = np.random.default_rng(sampling.seed)
        self._detokenizer = Detokenizer(tokenizer, self.prompt[-_CONTEXT:])
        self._text = StoppedText(sampling.stop)

    @property
    def text(self) -> str:
        """The text that is certain: a stop text that may be about to come is not in it."""
        return self._text.certain

    def take(self, logits: Logits) -> None:
        """Draw the next token from `logits [vocab]`; sets `reason` when it ends the completion."""
        early = len(self.tokens) < self.sampling.min_tokens
        if early and self._eos:
            logits = logits.copy()
            logits[list(self._eos)] = -np.inf
        token = draw(logits, self.sampling, self._generator)
        if token in self._eos and not self.sampling.ignore_eos:
            self._end("stop")
            return
        self.tokens.append(token)
        if self.sampling.logprobs is not None:
            self.logprobs.append(_logprobs(logits, token, self.sampling.logprobs))
        if self._text.add(self._detokenizer.add(token), search=not early):
            self.reason = "stop"
        elif len(self.tokens) >= self._limit:
            self._end("length")

    def _end(self, reason: str) -> None:
        stopped = self._text.add(self._detokenizer.rest(), search=True)
        self._text.release()
        self.reason = "stop" if stopped else reason


def _logprobs(logits: Logits, token: int, count: int) -> Logprobs:
    values = log_softmax(logits)
    return float(values[token]), {int(i): float(values[i]) for i in likeliest(values, count)}


# Tokens of the prompt that the first of the completion is decoded with, as vLLM does.
_CONTEXT = 6


class Detokenizer:
    """Tokens to text piece by piece; the pieces together are the text of all tokens.

    A token's text depends on those before it, so two pieces are decoded anew with every token. A
    piece that ends inside a character waits for the next token. `prefix`: the tokens before, of
    which nothing is told; without them the first piece would be the beginning of a text, which
    has no space before it.
    """

    def __init__(self, tokenizer: Any, prefix: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._tokens = list(prefix)
        self._before, self._told = 0, len(prefix)

    def add(self, token: int) -> str:
        """The text that became certain with `token`."""
        self._tokens.append(token)
        return self._piece(final=False)

    def rest(self) -> str:
        """What is left at the end: an unfinished character, told as such."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        known = self._decode(self._tokens[self._before : self._told])
        text: str = self._decode(self._tokens[self._before :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not final):
            return ""
        self._before, self._told = self._told, len(self._tokens)
        return text[len(known) :]


class StoppedText:
    """Text that ends before the first of `stops`. `certain`: the text so far, without an end that
    may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._text = self.certain = ""

    def add(self, piece: str, search: bool) -> bool:
        """Add a piece; whether it completes a stop text. Without `search` none is looked for."""
        begin = len(self._text)
        self._text += piece
        ends = [self._text.find(stop, max(0, begin - len(stop) + 1)) for stop in self._stops]
        ends = [end for end in ends if end >= 0 and search]
        if ends:
            self.certain = self._text = self._text[: min(ends)]
            return True
        begun = max((_begun(self._text, stop) for stop in self._stops), default=0)
        self.certain = self._text[: len(self._text) - begun]
        return False

    def release(self) -> None:
        """Nothing more comes: all of the text is certain."""
        self.certain = self._text


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    begin = max(0, len(text) - len(stop) + 1)
    while (begin := text.find(stop[0], begin)) >= 0:
        if stop.startswith(text[begin:]):
            return len(text) - begin
        begin += 1
    return 0
