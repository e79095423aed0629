"""Where texts are tokenized: long ones beside the event loop, too many nowhere."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from dora_serve.onnxruntime.limits import Limits
from dora_serve.server.routes import encoding, generating
from dora_serve.server.wire.errors import ApiError
from tests.conftest import MODELS

TEXT = "good film " * 20
Threads = set[threading.Thread]


def tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(str(MODELS / folder / "tokenizer.json"))


def engine(folder: str, used: Threads) -> Any:
    """What the routes need of an engine; `used` takes the threads that tokenize."""
    real = tokenizer(folder)

    def encode(text: str, **more: bool) -> Any:
        used.add(threading.current_thread())
        return real.encode(text, **more)

    part = SimpleNamespace(encode=encode, encoding=encode)
    return SimpleNamespace(limits=Limits(), tokenizer=part, encoder=part)


@pytest.mark.parametrize(("count", "in_loop"), [(3, True), (200, False)])
def test_many_short_texts_do_not_hold_up_the_event_loop(count: int, in_loop: bool) -> None:
    used: Threads = set()
    prompts = asyncio.run(
        generating.encode(engine("tiny-llama-base", used), [*[TEXT] * count, [1, 2]])
    )
    assert prompts == [tokenizer("tiny-llama-base").encode(TEXT).ids] * count + [[1, 2]]
    assert (used == {threading.current_thread()}) is in_loop
    used.clear()
    rows = asyncio.run(encoding.encode(engine("tiny-roberta-base", used), [TEXT] * count))
    found = tokenizer("tiny-roberta-base").encode(TEXT)
    assert rows == [(found.ids, found.type_ids)] * count
    assert (used == {threading.current_thread()}) is in_loop


def test_too_many_texts_are_refused_before_they_are_tokenized() -> None:
    used: Threads = set()
    with pytest.raises(ApiError, match="more than can wait"):
        asyncio.run(encoding.encode(engine("tiny-roberta-base", used), [TEXT] * 300))
    assert not used
