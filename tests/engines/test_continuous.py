"""Continuous batching: whatever comes and goes beside a request, its tokens are its own."""

from __future__ import annotations

import queue
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dora_serve import DoraExportError
from dora_serve.onnxruntime.continuous import ContinuousDecoder
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.decoder_graph import DecoderGraph
from dora_serve.onnxruntime.generation import Detokenizer, StoppedText
from dora_serve.onnxruntime.limits import Limits, QueueFull
from dora_serve.onnxruntime.request import Delta
from dora_serve.onnxruntime.runner import Runner
from dora_serve.onnxruntime.sampling import Sampling, draw
from dora_serve.onnxruntime.slots import Slots
from tests.engines.decoders import Case
from tests.engines.test_onnx_decoder import llama
from tests.engines.test_onnx_families import adapted

__all__ = ["llama"]
WORDS = "one two three four five six seven eight nine ten eleven cat moon river count copy".split()


def file(case: Case, name: str | None) -> str | None:
    return None if name is None else str(case.folder / "adapters" / f"{name}.onnx_adapter")


class Answer:
    """Collects what one request is told."""

    def __init__(self) -> None:
        self.updates: queue.Queue[Delta] = queue.Queue()

    def wait(self) -> tuple[list[int], str, str | None]:
        """Tokens, text and reason."""
        tokens: list[int] = []
        text = ""
        while True:
            update = self.updates.get(timeout=60)
            if update.error is not None:
                raise update.error
            tokens += update.tokens
            text += update.text
            if update.reason is not None:
                return tokens, text, update.reason


@contextmanager
def running(case: Case, **limits: int) -> Iterator[ContinuousDecoder]:
    engine = ContinuousDecoder(DecoderGraph(case.folder, threads=1), Limits(**limits))
    try:
        yield engine
    finally:
        engine.close()


Wish = tuple[list[int], str | None, Sampling]


def wishes(case: Case, count: int, seed: int) -> list[Wish]:
    """Prompts of 1 to 40 tokens, adapters, and how to draw how many tokens."""
    choose = random.Random(seed)
    decoder = Decoder(case.folder, threads=1)
    found = []
    for number in range(count):
        ids = decoder.encode(" ".join(choose.choices(WORDS, k=choose.randint(1, 38))))
        sampling = Sampling(
            max_tokens=choose.randint(1, 30),
            temperature=choose.choice((0.0, 0.0, 1.5)),
            seed=number,
            ignore_eos=choose.random() < 0.7,
        )
        found.append((ids, choose.choice((None, *case.runs)), sampling))
    return found


def check(case: Case, engine: ContinuousDecoder, asked: list[Wish], seed: int = 0) -> None:
    """Submit at random times, some of it twice to be cancelled at a random time."""
    decoder = Decoder(case.folder, threads=1)
    alone = [decoder.generate([ids], name, sampling)[0] for ids, name, sampling in asked]
    choose = random.Random(seed)
    answers = []
    for ids, name, sampling in asked:
        answers.append(Answer())
        engine.submit(ids, file(case, name), [sampling], [answers[-1].updates.put])
        if choose.random() < 0.3:
            ghost = Answer()
            (request,) = engine.submit(ids, file(case, name), [sampling], [ghost.updates.put])
            if choose.random() < 0.5:
                ghost.updates.get(timeout=60)
            request.cancelled = True
        time.sleep(choose.choice((0, 0, 0, 0.002)))
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.wait() == (expected.tokens, expected.text, expected.reason)
    bare = [decoder.generate([ids], None, sampling)[0].tokens for ids, _, sampling in asked]
    assert bare != [row.tokens for row in alone]  # the control: adapters tell


@pytest.mark.parametrize("seed", range(3))
def test_tokens_under_any_interleaving(llama: Case, seed: int) -> None:
    with running(llama, max_rows=5, piece=3) as engine:
        check(llama, engine, wishes(llama, 40, seed), seed)
        assert engine.slots.rows >= 4
    assert engine.running == engine.waiting == 0


@pytest.mark.parametrize("name", [pytest.param("gemma3", marks=pytest.mark.further), "qwen3"])
def test_windows_and_other_graphs(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = adapted(name, tmp_path_factory)
    with running(case, max_rows=4, piece=5) as engine:
        check(case, engine, wishes(case, 20, seed=3))


def test_rows_that_find_no_room_begin_again(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_serve.onnxruntime.slots._STEP", 8)
    with running(llama) as engine:
        token_bytes = engine.slots.token_bytes
    with running(llama, cache_bytes=150 * token_bytes, piece=4) as engine:
        check(llama, engine, wishes(llama, 40, seed=4))
        assert engine.preemptions > 0
        assert engine.slots.rows * engine.slots.length <= 150


def test_a_row_in_another_slot_would_be_found(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "move", lambda *_: None)
    with running(llama, max_rows=5, piece=3) as engine, pytest.raises(AssertionError):
        check(llama, engine, wishes(llama, 40, seed=0))


@pytest.mark.parametrize("broken", [False, True])
def test_short_prompts_of_one_adapter_begin_together(
    llama: Case, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    prefill, together = Runner.prefill_all, []

    def counted(runner: Runner, slot: int, rows: list[list[int]], adapter: str | None) -> Any:
        together.append([len(row) for row in rows])
        return prefill(runner, slot, rows, None if broken else adapter)

    monkeypatch.setattr(Runner, "prefill_all", counted)
    words, sampling = random.Random(0), Sampling(max_tokens=9, ignore_eos=True)
    lengths = {"down": [3, 12, 1, 9, 30, 2, 2], "second": [16, 15, 14, 2, 7], None: [5, 5, 5]}
    asked = [
        (words.choices(range(3, 80), k=length), name)
        for name in lengths
        for length in lengths[name]
    ]
    decoder = Decoder(llama.folder, threads=1)
    expected = [decoder.generate([ids], name, sampling)[0].tokens for ids, name in asked]
    with running(llama, piece=48) as engine:
        answers = [Answer() for _ in asked]
        with engine._changed:  # so that all are there when the first begins
            for (ids, name), answer in zip(asked, answers, strict=True):
                engine.submit(ids, file(llama, name), [sampling], [answer.updates.put])
        found = [answer.wait()[0] for answer in answers]
    assert together == [[3, 12, 1, 9], [2, 2], [16, 15, 14], [2, 7], [5, 5, 5]]
    assert (found == expected) != broken  # the control


def test_adapters_come_and_go_within_their_bound(llama: Case, tmp_path: Path) -> None:
    paths = {}
    for i in range(6):
        paths[i] = shutil.copyfile(str(file(llama, ("down", "second")[i % 2])), tmp_path / str(i))
    size = max(path.stat().st_size for path in paths.values())
    words = {0: "eight", 1: "eleven"}
    with running(llama, adapter_bytes=3 * size) as engine:
        ids = engine.graph.encode("count : nine")
        for _ in range(2):
            answers = {i: Answer() for i in paths}
            for i, answer in answers.items():
                engine.submit(ids, str(paths[i]), [Sampling()], [answer.updates.put])
            for i, answer in answers.items():
                assert answer.wait()[1].split()[0] == words[i % 2]
            assert engine.pool.bytes <= 3 * size
        # Loaded means copied: what becomes of the file is felt only by those who load it again.
        assert str(paths[5]) in engine.pool
        paths[5].unlink()
        paths[0].write_bytes(paths[0].read_bytes()[:200])
        engine.pool.forget(str(paths[0]))
        for i, says in ((5, None), (0, "not an ONNX Runtime adapter")):
            answer = Answer()
            engine.submit(ids, str(paths[i]), [Sampling()], [answer.updates.put])
            if says is None:
                assert answer.wait()[1].split()[0] == words[i % 2]
            else:
                with pytest.raises(DoraExportError, match=says):
                    answer.wait()


def test_an_adapter_forgotten_in_the_middle_of_a_step_fails_no_row(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step may compute with adapters beside that no row needs any more."""
    down, second = (str(file(llama, name)) for name in ("down", "second"))
    with running(llama) as engine:
        stack, used = Runner._stack, []

        def forget(runner: Runner, adapters: Sequence[str | None]) -> tuple[str, ...]:
            found = stack(runner, adapters)
            used.append(second in found and second not in adapters)
            engine.pool.forget(second)  # as when the server's thread is told so just now
            return found

        monkeypatch.setattr(Runner, "_stack", forget)
        ids = engine.graph.encode("count : nine")
        row, brief, last = Answer(), Answer(), Answer()
        long = Sampling(max_tokens=30, ignore_eos=True)
        engine.submit(ids, down, [long], [row.updates.put])
        engine.submit(ids, second, [Sampling(max_tokens=8)], [brief.updates.put])
        assert brief.wait()[1].split()[0] == "eleven"
        expected = Decoder(llama.folder, threads=1).generate([ids], "down", long)[0]
        assert row.wait()[0] == expected.tokens
        assert any(used)  # the control
        engine.submit(ids, None, [Sampling(max_tokens=1)], [last.updates.put])
        last.wait()
        assert second not in engine.pool
        assert down in engine.pool


def test_bounds(llama: Case) -> None:
    with running(llama, max_rows=1, max_waiting=3) as engine:
        with pytest.raises(DoraExportError, match="empty or too long"):
            engine.submit([5] * 64, None, [Sampling()], [print])
        answers = [Answer() for _ in range(40)]
        accepted = []
        for answer in answers:
            try:
                engine.submit([5] * 9, None, [Sampling(ignore_eos=True)], [answer.updates.put])
                accepted.append(answer)
            except QueueFull:
                continue
        assert 3 <= len(accepted) < 40
        assert len({tuple(answer.wait()[0]) for answer in accepted}) == 1


def test_cancelled_requests_make_room_for_others(llama: Case) -> None:
    with running(llama, max_rows=1, max_waiting=4) as engine:
        first = Answer()
        engine.submit([5], None, [Sampling(max_tokens=60, ignore_eos=True)], [first.updates.put])
        first.updates.get(timeout=60)
        for _ in range(40):  # each time as many as may wait
            ghosts = engine.submit([5], None, [Sampling()] * 3, [print] * 3)
            for ghost in ghosts:
                ghost.cancelled = True
            while engine.waiting:
                time.sleep(0.001)
        last = Answer()
        engine.submit([5], None, [Sampling(max_tokens=2)], [last.updates.put])
        assert last.wait()
        assert first.wait()


def test_a_row_that_cannot_be_drawn_fails_alone(llama: Case) -> None:
    asked = wishes(llama, 10, seed=5)
    decoder = Decoder(llama.folder, threads=1)
    with running(llama) as engine:
        answers = [Answer() for _ in asked]
        broken = Answer()
        bad = Sampling(temperature=float("nan"))
        for (ids, name, sampling), answer in zip(asked, answers, strict=True):
            engine.submit(ids, file(llama, name), [sampling], [answer.updates.put])
            engine.submit(ids, None, [bad], [broken.updates.put])
        for (ids, name, sampling), answer in zip(asked, answers, strict=True):
            assert answer.wait()[0] == decoder.generate([ids], name, sampling)[0].tokens
        with pytest.raises(ValueError, match="NaN"):
            broken.wait()


def test_pieces_of_text_are_the_whole_text() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    choose = random.Random(0)
    for _ in range(50):
        text = "".join(choose.choices("añ水🙂 \n\u0300", k=20))
        ids = tokenizer.encode(text).ids
        ids = ids[: choose.randint(1, len(ids))]  # may end within a character
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.add(token) for token in ids]
        assert "".join(pieces) + detokenizer.rest() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_texts_across_pieces(size: int) -> None:
    text, stops = "one two STOp STOP three", ("STOP", "two S!")
    stopped, told = StoppedText(stops), ""
    for at in range(0, len(text), size):
        if stopped.add(text[at : at + size], search=True):
            break
        assert text.startswith(stopped.certain)
        told = stopped.certain
    assert stopped.certain == "one two STOp "
    assert stopped.certain.startswith(told)


def test_drawing() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for sampling, allowed in (
        (Sampling(temperature=1, top_p=0.7), {0, 1}),
        (Sampling(temperature=1, top_k=3), {0, 1, 2}),
        (Sampling(temperature=1), {0, 1, 2, 3}),
        (Sampling(temperature=0), {0}),
    ):
        generator = np.random.default_rng(0)
        counts = Counter(draw(logits, sampling, generator) for _ in range(4000))
        assert counts.keys() == allowed
        share = counts[0] / 4000
        whole = sum((0.5, 0.3, 0.15, 0.05)[i] for i in allowed)
        assert share == pytest.approx(0.5 / whole, abs=0.03)
