"""Texts to tokens and back, as the files of a model's folder say: in a process with bounds."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .bounded.process import Process
from .wire.errors import ApiError
from .wire.requests import Text

_WORD = 64  # tokens of a word that may not be written
Row = tuple[list[int], list[int]]  # token ids and their types


class Question(NamedTuple):
    """`starts` and `ends`: the characters of its text that each token is; `inside`: whether that is
    the context's."""

    row: Row
    starts: list[int]
    ends: list[int]
    inside: list[int]


class Texts:
    """The tokenizer and the chat template of `folder`, or the one that is `template`. Its
    methods raise `ApiError` for a text that is too long, and for whatever else the files refuse."""

    def __init__(self, folder: str, template: str | None = None) -> None:
        self.process = Process(folder, template=template)

    async def encode(
        self,
        inputs: Sequence[Text | tuple[str, str]],
        longest: int,
        param: str,
        special: bool = True,
        kept: int | None = None,
        side: str | None = None,
        usual: str = "left",
    ) -> list[Row]:
        """The tokens of every text, or pair of texts, at most `longest`; token ids stay as they
        are. `kept`: at most so many of each, those at the end (`side` "right": at the begin). Of a
        text, what the tokenizer puts around it is among them, but where a side is given. `usual`:
        which side is cut where none is given."""
        texts: list[Any] = [given for given in inputs if not isinstance(given, list)]
        before: list[str] = []
        if texts and isinstance(texts[0], tuple):
            before, texts = map(list, zip(*texts, strict=True))
            before = before[:1] if len({*before}) == 1 else before  # told once: it may be long
        lengths: list[int] = []
        blob = b""
        if texts:
            lengths, blob = await self.process.call(
                "encode",
                texts=texts,
                before=before,
                special=special,
                longest=longest,
                param=param,
                kept=kept,
                side=side,
                usual=usual,
            )
        rows = _rows(lengths, blob)
        found = [(i, [0] * len(i)) if isinstance(i, list) else next(rows) for i in inputs]
        side = side or usual
        return [(cut(ids, kept, side), cut(types, kept, side)) for ids, types in found]

    async def question(self, question: str, context: str, longest: int) -> Question:
        """The tokens of both together, at most `longest`."""
        lengths, blob = await self.process.call(
            "question", json.dumps([question, context]).encode(), longest=longest
        )
        ids, types, starts, ends, inside = next(_parts(lengths, blob, 5))
        return Question((ids, types), starts, ends, inside)

    async def words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words that may not be written, at the begin of a text and within it, as
        vLLM finds them."""
        if not words:
            return ()
        texts = [space + word.lstrip() for word in words for space in ("", " ")]
        rows = [tuple(ids) for ids, _ in await self.encode(texts, _WORD, "bad_words", False)]
        found: list[tuple[int, ...]] = []
        for bare, spaced in zip(rows[::2], rows[1::2], strict=True):
            if not bare:
                raise ApiError("a word has no tokens", param="bad_words")
            found.append(bare)
            if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
                found.append(spaced)
        return tuple(found)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation: bool,
        longest: int,
        values: Mapping[str, Any] | None = None,
        continued: bool = False,
        special: bool = False,
        kept: int | None = None,
        side: str | None = None,
    ) -> list[int]:
        """The tokens of a conversation, as `ChatTemplate.render` takes it, cut as `encode` cuts."""
        told = await self.process.call(
            "chat",
            json.dumps([messages, generation, values, continued]).encode(),
            special=special,
            longest=longest,
            kept=kept,
            side=side,
        )
        return cut(next(_rows(*told))[0], kept, side)

    async def tokenize(
        self,
        given: str | Sequence[Mapping[str, Any]],
        special: bool | None,
        generation: bool,
        longest: int,
        strings: bool,
        values: Mapping[str, Any] | None = None,
        continued: bool = False,
    ) -> bytes:
        """`answers.Tokens` as JSON, of a text or of a conversation."""
        _, answer = await self.process.call(
            "tokenize",
            json.dumps([given, generation, values, continued]).encode(),
            special=special,
            longest=longest,
            strings=strings,
        )
        return answer

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        """`answers.Text` as JSON."""
        _, answer = await self.process.call("detokenize", json.dumps(tokens).encode())
        return answer


def cut(ids: list[int], kept: int | None, side: str | None) -> list[int]:
    """At most `kept` of `ids`, those at the end, with `side` "right" those at the begin."""
    if kept is None:
        return ids
    return ids[:kept] if side == "right" else ids[-kept:]


def _rows(lengths: Sequence[int], blob: bytes) -> Iterator[Row]:
    return ((ids, types) for ids, types in _parts(lengths, blob, 2))


def _parts(lengths: Sequence[int], blob: bytes, count: int) -> Iterator[list[list[int]]]:
    """Of every text the `count` numbers of its tokens, which `blob` has one behind the other."""
    numbers, begin = array("I", blob), 0
    every = len(numbers) // count
    for end in itertools.accumulate(lengths):
        yield [numbers[i * every + begin : i * every + end].tolist() for i in range(count)]
        begin = end
