"""Completions that a grammar accepts: which tokens may come next.

The masks are computed beside the graph's next run, in threads of their own, and without the
interpreter's lock. A grammar has bounds of time and memory: one that needs more is an error, since
whoever has a row in the same batch waits for its masks.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from .session import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sampling import Logits

# Some milliseconds and a few MB for a step, as llguidance counts them.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}

# Seconds of the processor that the masks of a grammar may take, of all that follow it.
_AT_ONCE, _PER_TOKEN = 1.0, 0.005


def limits() -> Any:
    """Of one grammar."""
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)


def unforced(grammar: str) -> str:
    """The same grammar, whose tokens are all the model's choice. Otherwise llguidance chooses those
    of a text that has to come: among them the special token that is written so, which it then takes
    for no text or which ends the answer; and without end where such a text never ends, as that of
    `/b+/ "b"`, whose first part takes every b there is."""
    if grammar.startswith("{"):  # as it writes schemas and patterns
        (one,) = json.loads(grammar)["grammars"]
        schema = one.get("json_schema")
        grammar = one["lark_grammar"] if schema is None else f"start: %json {json.dumps(schema)}"
    return f'{grammar}\n%llguidance {{"no_forcing": true}}'  # of several the last counts


class Grammars:
    """Of a model: `vocabulary` logits, the ends `eos`, and its `tokenizer`.

    Its tokens are made bytes at once, and not for the first grammar: of 262,144 tokens that takes
    seconds, in which the interpreter's lock is held and no client of any model is answered.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        added = tokenizer.get_added_tokens_decoder().values()
        forms = (form for each in added if each.special for form in _forms(each.content))
        self._marks = {_bare(form) for form in forms} - {""}
        self._words: Any = None
        self._refusal: str | None = None
        try:
            self._words = _as_bytes(tokenizer, vocabulary, eos)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library too
            self._refusal = str(error)[:200]

    def compile(self, grammar: str) -> Grammar:
        """`grammar` as llguidance writes it. Raises `EngineError` for one that it refuses."""
        from llguidance import LLMatcher

        if self._refusal is not None:
            raise EngineError(
                "this model's tokenizer does not say which bytes its tokens are",
                found=self._refusal,
                remedy="ask without a schema or grammar",
            )
        bare = _bare(grammar)
        if any(mark in bare for mark in self._marks):
            grammar = unforced(grammar)
        matcher = LLMatcher(self._words, grammar, log_level=0, limits=limits())
        _check(matcher)
        return Grammar(matcher, self._threads)


def _forms(text: str) -> tuple[str, str]:
    """A text as it is and as JSON writes it."""
    return text, json.dumps(text)[1:-1]


def _bare(text: str) -> str:
    """A text without what escapes its signs in a grammar."""
    return text.replace("\\", "")


def _as_bytes(tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> Any:
    from llguidance import LLTokenizer

    count = max(vocabulary, tokenizer.get_vocab_size())
    return LLTokenizer(tokenizer.to_str(), n_vocab=count, eos_token=sorted(eos))


class Grammar:
    """One that any number of completions may follow."""

    def __init__(self, matcher: Any, threads: ThreadPoolExecutor) -> None:
        self._matcher, self._threads = matcher, threads
        self._left = _AT_ONCE  # seconds

    def begin(self) -> Constraint:
        return Constraint(self, self._matcher.deep_copy())

    def follow(self, matcher: Any, token: int | None) -> Future[NDArray[np.bool_]]:
        """The tokens that may come next, once `token` came."""
        return self._threads.submit(self._next, matcher, token)

    def _next(self, matcher: Any, token: int | None) -> NDArray[np.bool_]:
        begin = time.thread_time()
        if token is not None and not matcher.is_stopped():
            matcher.consume_token(token)
        packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _check(matcher)
        self._left = min(_AT_ONCE, self._left + _PER_TOKEN) - (time.thread_time() - begin)
        if self._left < 0:
            raise EngineError(
                "the grammar takes too long", remedy="let less of it be read in several ways"
            )
        return np.unpackbits(packed, bitorder="little").view(np.bool_)


class Constraint:
    """What one completion may write next."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._mask = grammar.follow(matcher, None)

    def __call__(self, logits: Logits) -> Logits:
        """`logits [vocab]` without the tokens that may not come; the argument stays as it is.
        Raises `EngineError` when the grammar takes more than it may."""
        allowed = self._mask.result()[: len(logits)]
        return np.where(allowed, logits[: len(allowed)], np.float32(-np.inf))

    def take(self, token: int) -> None:
        """Go on with a token that was allowed."""
        self._mask = self._grammar.follow(self._matcher, token)


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise EngineError(
            "the grammar is wrong, or takes too much", found=matcher.get_error()[:500]
        )
