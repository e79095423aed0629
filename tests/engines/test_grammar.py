"""Masks of grammars, bounded in what they take."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from dora_serve.onnxruntime import grammar
from dora_serve.onnxruntime.grammar import Grammars
from dora_serve.onnxruntime.session import EngineError
from dora_serve.server.bounded import grammars as bounded
from dora_serve.server.bounded.grammars import read
from dora_serve.server.wire.errors import ApiError
from tests.server.test_structure import bytes_tokenizer

AMBIGUOUS = 'start: a a a a a a a a\na: start | "a" | "b" | ""'
PLAIN: dict[str, Any] = {"regex": None, "choice": None, "grammar": None}


@pytest.fixture(scope="module")
def known() -> Grammars:
    tokenizer = bytes_tokenizer()
    return Grammars(tokenizer, tokenizer.get_vocab_size(), frozenset({1}))


def follow(known: Grammars, text: str, choices: int, steps: int = 20) -> None:
    """Write what is allowed last, in so many completions one after the other."""
    _, compiled = read(json.dumps({**PLAIN, "grammar": text}).encode())
    one = known.compile(compiled.decode())
    for _ in range(choices):
        constraint = one.begin()
        for _ in range(steps):
            allowed = np.flatnonzero(np.isfinite(constraint(np.zeros(330, np.float32))))
            constraint.take(int(allowed[-1]))


def test_completions_share_the_time_of_their_grammar(
    known: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for many choices gets no more of it."""
    follow(known, "start: /[a-z]*/", 50)
    monkeypatch.setattr(grammar, "_PER_TOKEN", 0)
    monkeypatch.setattr(grammar, "_AT_ONCE", 1e-9)
    with pytest.raises(EngineError, match="takes too long"):
        follow(known, "start: /[a-z]*/", 1)
    monkeypatch.setattr(grammar, "_AT_ONCE", 0.05)
    with pytest.raises(EngineError, match="takes too"):
        follow(known, AMBIGUOUS, 500)


def test_the_first_grammar_of_a_large_vocabulary_holds_up_nobody() -> None:
    """The tokens of Gemma took seconds, in which no client was answered."""
    known = bytes_tokenizer()
    known.add_tokens([AddedToken(f"{number:05}") for number in range(3_000)])
    begin = time.thread_time()
    grammars = Grammars(known, known.get_vocab_size(), frozenset({1}))
    made = time.thread_time()
    grammars.compile(LLMatcher.grammar_from_regex("[a-z]+"))
    assert time.thread_time() - made < (made - begin) / 2


def test_a_tokenizer_without_bytes_refuses_every_grammar() -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    grammars = Grammars(words, 2, frozenset({1}))
    for _ in range(2):
        with pytest.raises(EngineError, match="which bytes its tokens are"):
            grammars.compile(LLMatcher.grammar_from_regex("[a-z]+"))


def test_time_that_is_not_used_comes_back(known: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_AT_ONCE", 0.5)
    monkeypatch.setattr(grammar, "_PER_TOKEN", 0.5)
    follow(known, AMBIGUOUS, 20)


def test_a_grammar_that_compiles_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    def schema(multiple: int) -> bytes:
        given = {"json": {"type": "integer", "multipleOf": multiple}, "flexible": True}
        return json.dumps({**given, "closed": False, "pattern": None}).encode()

    read(schema(7))
    monkeypatch.setattr(bounded, "_QUICK", 0)
    with pytest.raises(ApiError, match="takes too long"):
        read(schema(7))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "NoExtensionBias"),
        ("\ud800", "schema or grammar"),
        ({"type": "string", "pattern": "[^\\s\\S]"}, "schema or grammar"),
    ],
)
def test_what_nothing_can_follow_is_refused_before_it_is_compiled(given: Any, why: str) -> None:
    asked = {"json": given, "flexible": True, "closed": False, "pattern": None}
    with pytest.raises(ApiError, match=why):
        read(json.dumps(asked).encode())
