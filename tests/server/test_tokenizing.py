"""Texts become tokens in a process of their own; what takes too much ends it, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from converters.files.json_files import read_json
from dora_serve.server.bounded import process
from dora_serve.server.bounded.process import Process
from dora_serve.server.tokenizing import Texts
from dora_serve.server.wire.errors import ApiError
from tests.conftest import MODELS

TEXT = "good film " * 20
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ASKED = [{"role": "user", "content": "good"}]


def run(folder: Path, work: Callable[[Texts], Awaitable[Any]], template: str | None = None) -> Any:
    async def main() -> Any:
        texts = Texts(str(folder), template)
        try:
            return await work(texts)
        finally:
            await texts.process.close()

    return asyncio.run(main())


@pytest.mark.parametrize("folder", ["tiny-llama-base", "tiny-roberta-base"])
def test_tokens_are_the_tokenizers(folder: str) -> None:
    truth = Tokenizer.from_file(str(MODELS / folder / "tokenizer.json"))
    given: list[str | list[int]] = [TEXT, [1, 2], "bad", ""]

    async def work(texts: Texts) -> Any:
        rows = await texts.encode(given, 100, "input")
        bare = await texts.encode([TEXT], 100, "input", special=False)
        told = json.loads(await texts.tokenize(TEXT, None, True, 64, True))
        back = json.loads(await texts.detokenize([5, 6, 7]))
        return rows, bare, told, back

    rows, bare, told, back = run(MODELS / folder, work)
    whole = [truth.encode(text) if isinstance(text, str) else None for text in given]
    expected = [(each.ids, each.type_ids) if each else ([1, 2], [0, 0]) for each in whole]
    assert rows == expected
    assert bare[0][0] == truth.encode(TEXT, add_special_tokens=False).ids != rows[0][0]
    assert whole[0] is not None
    assert told["tokens"] == rows[0][0]
    assert told["token_strs"] == whole[0].tokens
    assert back["prompt"] == truth.decode([5, 6, 7], skip_special_tokens=False)


@pytest.mark.parametrize("text", [TEXT, "x" * (2 << 20)])
def test_what_is_too_long_is_refused(text: str) -> None:
    with pytest.raises(ApiError, match="too long") as caught:
        run(MODELS / "tiny-llama-base", lambda texts: texts.encode([text], 10, "prompt"))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert caught.value.param == "prompt"


@pytest.mark.further
def test_a_template_without_end_ends_its_process_alone(tmp_path: Path) -> None:
    """It is the kernel that ends it, so that it ends too when the server is gone."""
    base = Path(shutil.copytree(MODELS / "tiny-llama-base", tmp_path / "base"))
    (base / "chat_template.jinja").write_text(LOOPS)

    async def work(texts: Texts) -> Any:
        with pytest.raises(ApiError, match="takes more than") as caught:
            await texts.chat(ASKED, True, 64)
        assert caught.value.status == 400
        return await texts.encode(["cat"], 64, "prompt")

    assert run(base, work)[0][0][-1] > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_ended_from_outside(number: signal.Signals) -> None:
    """SIGTERM to the group lets it finish what was accepted; after SIGKILL there is another."""

    async def work(texts: Texts) -> Any:
        await texts.process.start()
        first = texts.process._process
        assert first is not None
        os.kill(first.pid, number)
        await asyncio.sleep(0.2)
        with suppress(ApiError):  # it may not be known yet that it is gone
            await texts.encode(["cat"], 64, "prompt")
        return first, texts.process._process, await texts.encode(["cat"], 64, "prompt")

    first, second, rows = run(MODELS / "tiny-llama-base", work)
    assert (first is second) is (number == signal.SIGTERM)
    assert rows[0][0]


def test_calls_wait_for_each_other_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_WAITING", 3)

    async def work(texts: Texts) -> list[Any]:
        asked = [texts.encode(["cat"], 64, "prompt") for _ in range(5)]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    answers = run(MODELS / "tiny-llama-base", work)
    refused = [each for each in answers if isinstance(each, ApiError)]
    assert [each.status for each in refused] == [429, 429]
    assert len([each for each in answers if isinstance(each, list)]) == 3


def test_files_that_are_missing_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="no tokenizer here") as caught:
        run(tmp_path, lambda texts: texts.encode(["cat"], 64, "prompt"))
    assert caught.value.status == 503
    shutil.copy(MODELS / "tiny-llama-base" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ApiError) as caught:
        run(tmp_path, lambda texts: texts.chat(ASKED, True, 64))
    assert caught.value.status == 503
    assert read_json(tmp_path / "tokenizer.json")


def test_without_a_folder_bodies_are_read() -> None:
    async def main() -> Any:
        reader = Process()
        try:
            fine = await reader.call(
                "check", b'{"model": "x", "tokens": [1]}', kind="DetokenizeRequest"
            )
            wrong = await reader.call(
                "check", b'{"model": "x", "tokens": [-1]}', kind="DetokenizeRequest"
            )
            return fine[0], wrong[0]
        finally:
            await reader.close()

    fine, wrong = asyncio.run(main())
    assert fine is None
    assert wrong["loc"] == ["body", "tokens", "0"]


@pytest.mark.parametrize("firsts", [["cat moon"], ["cat", "moon", ""]])
def test_pairs_are_the_tokenizers_and_what_all_have_is_told_once(firsts: list[str]) -> None:
    folder = MODELS / "tiny-roberta-base"
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = list(zip(firsts * (3 // len(firsts)), [TEXT, "bad", ""], strict=True))
    told: list[dict[str, Any]] = []

    async def work(texts: Texts) -> Any:
        call = texts.process.call

        async def telling(name: str, blob: bytes = b"", **given: Any) -> Any:
            told.append(given)
            return await call(name, blob, **given)

        texts.process.call = telling  # type: ignore[method-assign]
        return await texts.encode(pairs, 100, "input")

    whole = [truth.encode(*pair) for pair in pairs]
    assert run(folder, work) == [(each.ids, each.type_ids) for each in whole]
    assert [given["before"] for given in told] == [firsts]
    assert whole[0].ids != truth.encode(TEXT).ids


def test_what_is_read_anew_may_not_have_changed(tmp_path: Path) -> None:
    """A process that ended is followed by another, at a moment that any client chooses: the next
    texts were read with whatever tokenizer and template lay there by then."""
    folder = shutil.copytree(MODELS / "tiny-llama-base", tmp_path / "model")
    config = folder / "tokenizer_config.json"
    before = config.read_text()

    async def work(texts: Texts) -> list[list[int]]:
        found = [(await texts.encode(["nine"], 9, "prompt"))[0][0]]
        for text in (before, before.replace("<unk>", "<s>"), before):
            await texts.process.close()
            config.write_text(text)
            try:
                found.append((await texts.encode(["nine"], 9, "prompt"))[0][0])
            except ApiError as error:
                assert error.status == 503
                assert "are others since the server began" in str(error)
                found.append([])
        return found

    first, again, changed, last = run(folder, work)
    assert first == again == last
    assert not changed


def test_a_template_that_is_given_is_read_once() -> None:
    async def work(texts: Texts) -> list[list[int]]:
        found = []
        for _ in range(2):
            found.append(await texts.chat(ASKED, False, 9))
            await texts.process.close()
        found.append((await texts.encode(["nine"], 9, "prompt", False))[0][0])
        return found

    folder = MODELS / "tiny-llama-base"
    first, again, truth = run(folder, work, "{{ 'nine' }}")
    assert first == again == truth
