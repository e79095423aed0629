"""Texts to tokens and back, as the files of a model's folder say: in a process with bounds."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence

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
        self, messages: Sequence[Mapping[str, str]], generation: bool, longest: int
    ) -> list[int]:
        """The tokens of a conversation, with `generation` up to where the answer begins."""
        told = await self.process.call(
            "chat", json.dumps(messages).encode(), generation=generation, longest=longest
        )
        return next(_rows(*told))[0]

    async def tokenize(
        self,
        given: str | Sequence[Mapping[str, str]],
        special: bool | None,
        generation: bool,
        longest: int,
        strings: bool,
    ) -> bytes:
        """`answers.Tokens` as JSON, of a text or of a conversation."""
        _, answer = await self.process.call(
            "tokenize",
            json.dumps(given).encode(),
            special=special,
            generation=generation,
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
