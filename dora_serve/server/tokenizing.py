"""Texts to tokens and back, as the files of a model's folder say: in a process with bounds."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .bounded.process import Process
from .wire.requests import Text

Row = tuple[list[int], list[int]]  # token ids and their types


class Texts:
    """The tokenizer and the chat template of `folder`. Its methods raise `ApiError` for a text that
    is too long, and for whatever else the files refuse."""

    def __init__(self, folder: str) -> None:
        self.process = Process(folder)

    async def encode(
        self, inputs: Sequence[Text], longest: int, param: str, special: bool = True
    ) -> list[Row]:
        """Every text's tokens, at most `longest`; token ids stay as they are."""
        texts = [given for given in inputs if isinstance(given, str)]
        lengths: list[int] = []
        blob = b""
        if texts:
            lengths, blob = await self.process.call(
                "encode", texts=texts, special=special, longest=longest, param=param
            )
        rows = _rows(lengths, blob)
        return [next(rows) if isinstance(i, str) else (i, [0] * len(i)) for i in inputs]

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation: bool,
        longest: int,
        values: Mapping[str, Any] | None = None,
        continued: bool = False,
        special: bool = False,
    ) -> list[int]:
        """The tokens of a conversation, as `ChatTemplate.render` takes it."""
        told = await self.process.call(
            "chat",
            json.dumps([messages, generation, values, continued]).encode(),
            special=special,
            longest=longest,
        )
        return next(_rows(*told))[0]

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


def _rows(lengths: Sequence[int], blob: bytes) -> Iterator[Row]:
    numbers = array("I", blob)
    begin, half = 0, len(numbers) // 2
    for end in itertools.accumulate(lengths):
        yield numbers[begin:end].tolist(), numbers[half + begin : half + end].tolist()
        begin = end
