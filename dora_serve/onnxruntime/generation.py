"""One completion as it grows: its tokens, their text, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .sampling import Sampling, check_finite, draw, likeliest, log_softmax
from .shaping import Shaping

if TYPE_CHECKING:
    from .grammar import Constraint
    from .sampling import Logits

Logprobs = tuple[float, dict[int, float]]
# With how many tokens are as likely or likelier, itself among them.
PromptLogprobs = tuple[float, int, dict[int, float]]


class Generation:
    """What a row's logits became so far. `reason`: None while it goes on, then "stop" or "length".

    `logprobs`: at every step the log-probability of the token drawn, and the likeliest tokens with
    theirs, of the model's own logits (those that a grammar leaves), whatever the sampling makes of
    them. `end`: the token that
    ended it, which is not among `tokens`, with its log-probabilities. `stop_reason`: the text or
    the token id that ended it, None for those of `eos` that are not `named`.
    `prompt_logprobs`: of every token of the prompt but the first, as far as it was read. `room`:
    how many tokens the model's context leaves behind the prompt; `limit`: how many it may have.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        eos: frozenset[int],
        tokenizer: Any,
        room: int,
        named: frozenset[int] = frozenset(),
    ) -> None:
        # A prompt is not copied for each of many that complete it.
        self.prompt = prompt if isinstance(prompt, list) else list(prompt)
        self.sampling = sampling
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.end: tuple[int, Logprobs | None] | None = None
        self.reason: str | None = None
        self.stop_reason: str | int | None = None
        self.limit = min(sampling.max_tokens, room)
        self._eos = frozenset() if sampling.ignore_eos else eos
        self._unnamed = self._eos - named
        self._shaping = Shaping(sampling, self.prompt, eos)
        self._generator = np.random.default_rng(sampling.seed)
        self._detokenizer = Detokenizer(tokenizer, self.prompt[-_CONTEXT:], sampling)
        self._text = StoppedText(sampling.stop, sampling.include_stop_str_in_output)
        self._constraint: Constraint | None = None

    def begin(self) -> None:
        """Have what the first token takes be computed, beside whatever runs until then."""
        if self.sampling.grammar is not None and self._constraint is None:
            self._constraint = self.sampling.grammar.begin()

    @property
    def text(self) -> str:
        """The text that is certain: a stop text that may be about to come is not in it."""
        return self._text.certain

    def read_prompt(self, logits: Logits, begin: int) -> None:
        """Tell of `logits [n, vocab]`, those behind the prompt's tokens from `begin` on, how likely
        the prompt's next tokens were. Tokens that were told before are not told again."""
        count = self.sampling.prompt_logprobs
        assert count is not None
        for values, at in zip(logits, range(begin + 1, len(self.prompt)), strict=False):
            if at > len(self.prompt_logprobs):
                own = log_softmax(values)
                told, best = _logprobs(own, self.prompt[at], count)
                rank = int((own >= own[self.prompt[at]]).sum())
                self.prompt_logprobs.append((told, rank, best))

    def take(self, logits: Logits) -> None:
        """Draw the next token from `logits [vocab]`; sets `reason` when it ends the completion."""
        check_finite(logits)
        sampling = self.sampling
        early = len(self.tokens) < sampling.min_tokens
        self.begin()
        if self._constraint is not None:
            logits = self._constraint(logits)
        token = draw(self._shaping(logits, self.tokens), sampling, self._generator)
        told = None
        if sampling.logprobs is not None:
            told = _logprobs(log_softmax(logits), token, sampling.logprobs)
        if token in self._eos or token in sampling.stop_token_ids:
            self.end = token, told
            self.stop_reason = None if token in self._unnamed else token
            if sampling.include_stop_str_in_output:
                self._text.add(self._detokenizer.add(token), search=False)
            self._end("stop")
            return
        if self._constraint is not None:
            self._constraint.take(token)
        self.tokens.append(token)
        if told is not None:
            self.logprobs.append(told)
        if self._text.add(self._detokenizer.add(token), search=not early):
            self.reason, self.stop_reason = "stop", self._text.found
        elif len(self.tokens) >= self.limit:
            self._end("length")

    def found(self, tokens: Sequence[int], ends: frozenset[int], *, forced: bool) -> None:
        """Have it end with `tokens`, which a search has found, the last one its end if in `ends`;
        `forced`: that stands there since no more tokens may come."""
        ended, included = tokens[-1] in ends, self.sampling.include_stop_str_in_output
        self.tokens = [*tokens[:-1]] if ended else [*tokens]
        for token in tokens if included else self.tokens:
            self._text.add(self._detokenizer.add(token), search=False)
        if ended:
            self.end = tokens[-1], None
            self.stop_reason = None if forced or tokens[-1] in self._unnamed else tokens[-1]
        self._end("stop" if ended and not forced else "length")

    def _end(self, reason: str) -> None:
        stopped = self._text.add(self._detokenizer.rest(), search=True)
        self._text.release()
        if stopped:
            reason, self.stop_reason = "stop", self._text.found
        self.reason = reason


def _logprobs(values: Logits, token: int, count: int) -> Logprobs:
    return float(values[token]), {int(i): float(values[i]) for i in likeliest(values, count)}


# Tokens of the prompt that the first of the completion is decoded with, as vLLM does.
_CONTEXT = 6
# Tokens that wait for the end of a character, which has four bytes: what is longer is none.
_UNFINISHED = 64


class Detokenizer:
    """Tokens to text piece by piece; the pieces together are the text of all tokens.

    A token's text depends on those before it, so two pieces are decoded anew with every token. A
    piece that ends inside a character waits for the next tokens, but not for many: whatever comes,
    a token costs what the first one did. `prefix`: the tokens before, of
    which nothing is told; without them the first piece would be the beginning of a text, which
    has no space before it. `sampling`: whether special tokens are told, and with spaces between.
    """

    def __init__(
        self, tokenizer: Any, prefix: Sequence[int] = (), sampling: Sampling | None = None
    ) -> None:
        sampling = sampling or Sampling()
        self._decode = decoding(tokenizer, sampling.skip_special_tokens, sampling.marks)
        self._added: dict[int, Any] = {}  # whose texts are told without a space between
        if not (sampling.skip_special_tokens or sampling.spaces_between_special_tokens):
            self._added = tokenizer.get_added_tokens_decoder()
        self._tokens = list(prefix)
        self._before, self._told = 0, len(prefix)

    def add(self, token: int) -> str:
        """The text that became certain with `token`."""
        self._tokens.append(token)
        piece = self._piece(final=False)
        if token in self._added and self._tokens[-2:-1] and self._tokens[-2] in self._added:
            return str(self._added[token].content)
        return piece

    def rest(self) -> str:
        """What is left at the end: an unfinished character, told as such."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        known = self._decode(self._tokens[self._before : self._told])
        text: str = self._decode(self._tokens[self._before :])
        waits = len(self._tokens) - self._told
        if len(text) <= len(known):
            if waits > _UNFINISHED:  # of which nothing is told, as special tokens
                del self._tokens[self._told : -1]
            return ""
        if text.endswith("\ufffd") and not final and waits <= _UNFINISHED:
            return ""
        self._before, self._told = self._told, len(self._tokens)
        return text[len(known) :]


def decoding(
    tokenizer: Any, skip_special_tokens: bool, marks: Sequence[str] = ()
) -> Callable[[list[int]], str]:
    """What makes text of tokens, with or without the special ones; but for `marks`, which are told
    in either case."""
    kept = {tokenizer.token_to_id(mark) for mark in marks if skip_special_tokens}
    added = tokenizer.get_added_tokens_decoder() if kept - {None} else {}
    special = {token for token, text in added.items() if text.special}
    if not kept & special:
        return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    hidden = special - kept

    def decode(tokens: list[int]) -> str:
        told = [token for token in tokens if token not in hidden]
        return str(tokenizer.decode(told, skip_special_tokens=False))

    return decode


class StoppedText:
    """Text that ends before that of `stops` which is whole first. `certain`: the text so far,
    without an end that may be the beginning of a stop text. `found`: the stop text that ended it,
    which is in the text when it is `included`."""

    def __init__(self, stops: Sequence[str], included: bool = False) -> None:
        self._stops, self._included = stops, included
        self.found: str | None = None
        self._text = self.certain = ""

    def add(self, piece: str, search: bool) -> bool:
        """Add a piece; whether it completes a stop text. Without `search` none is looked for."""
        begin = len(self._text)
        self._text += piece
        ends = [
            (self._text.find(stop, max(0, begin - len(stop) + 1)), stop) for stop in self._stops
        ]
        ends = [(at, stop) for at, stop in ends if at >= 0 and search]
        if ends:
            # As if the letters came one by one: how the tokens cut them changes nothing.
            at, self.found = min(ends, key=lambda each: each[0] + len(each[1]))
            at += len(self.found) if self._included else 0
            self.certain = self._text = self._text[:at]
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
