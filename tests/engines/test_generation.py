"""Completions end where a plain reference ends them, and their pieces are the whole."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_serve.onnxruntime.generation import Detokenizer, Generation, StoppedText
from dora_serve.onnxruntime.limits import check_rows
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.onnxruntime.session import EngineError
from tests.engines.reference import Bytes, completed, stopped_at

QUICK = settings(max_examples=120, deadline=None, derandomize=True, database=None)
EOS, A, B, C = 0, *b"abc"
STOPS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=3)


def logits(order: list[int] | tuple[int, ...]) -> np.ndarray:
    """Logits whose largest are the tokens of `order`, in that order."""
    values = np.zeros(256, np.float32)
    values[list(order)] = np.arange(len(order), 0, -1)
    return values


def generation(sampling: Sampling, room: int = 99, eos: frozenset[int] | None = None) -> Generation:
    ends = frozenset({EOS}) if eos is None else eos
    return Generation(list(b"prompt"), sampling, ends, Bytes(), room)


@QUICK
@given(
    steps=st.lists(st.permutations([EOS, A, B, C]), min_size=9, max_size=9),
    stop=STOPS,
    most=st.integers(1, 8),
    least=st.integers(0, 9),
    room=st.integers(1, 9),
    ignore=st.booleans(),
)
def test_tokens_text_and_reason(
    steps: list[list[int]], stop: list[str], most: int, least: int, room: int, ignore: bool
) -> None:
    sampling = Sampling(
        max_tokens=most, min_tokens=least, stop=tuple(stop), ignore_eos=ignore, logprobs=1
    )
    done = generation(sampling, room)
    told = ""
    for order in steps:
        done.take(logits(order))
        assert done.text.startswith(told)  # what was told is never taken back
        told = done.text
        if done.reason is not None:
            break
    expected = completed(steps, sampling, frozenset({EOS}), room)
    assert (done.tokens, done.text, done.reason) == expected
    assert len(done.logprobs) == len(done.tokens)


@pytest.mark.parametrize("least", [0, 1, 2, 5])
def test_the_end_comes_no_earlier_than_min_tokens(least: int) -> None:
    done = generation(Sampling(max_tokens=9, min_tokens=least))
    while done.reason is None:
        done.take(logits([EOS, A]))
    assert (len(done.tokens), done.reason) == (least, "stop")


@pytest.mark.parametrize(("most", "room", "count"), [(3, 9, 3), (9, 3, 3), (3, 3, 3), (1, 1, 1)])
def test_the_nearest_bound_ends_it(most: int, room: int, count: int) -> None:
    done = generation(Sampling(max_tokens=most), room)
    while done.reason is None:
        done.take(logits([A]))
    assert (len(done.tokens), done.reason) == (count, "length")


@pytest.mark.parametrize("end", [EOS, C])
def test_every_end_of_several_ends_it(end: int) -> None:
    done = generation(Sampling(), eos=frozenset({EOS, C}))
    done.take(logits([A]))
    done.take(logits([end, A]))
    assert (done.tokens, done.text, done.reason) == ([A], "a", "stop")


def test_an_unfinished_character_is_told_at_the_end_alone() -> None:
    done = generation(Sampling(max_tokens=2))
    done.take(logits([B]))
    done.take(logits([0xE6]))
    assert (done.text, done.reason) == ("b\ufffd", "length")
    going = generation(Sampling(max_tokens=4))
    told = []
    for byte in "b水".encode():
        going.take(logits([byte]))
        told.append(going.text)
    assert told == ["b", "b", "b", "b水"]


class Counting:
    """Bytes, of which 0 has no text; `most`: tokens that were decoded at once."""

    most = 0

    def decode(self, tokens: list[int], **_: Any) -> str:
        self.most = max(self.most, len(tokens))
        return bytes(token for token in tokens if token).decode(errors="replace")


@pytest.mark.parametrize("none", [[0x80], [0], [0xE6, 0xB0], [0xF0]])
def test_what_is_no_character_makes_no_token_dear(none: list[int]) -> None:
    tokenizer = Counting()
    tokens = [*b"ab", *none * (800 // len(none)), *"c水d".encode()]
    detokenizer = Detokenizer(tokenizer)
    told = "".join(map(detokenizer.add, tokens)) + detokenizer.rest()
    assert tokenizer.most < 200
    assert told == Counting().decode(tokens)


def test_a_stop_text_that_only_the_end_completes() -> None:
    done = generation(Sampling(max_tokens=2, stop=("b\ufffd",)))
    done.take(logits([B]))
    assert (done.text, done.reason) == ("", None)
    done.take(logits([0xE6]))
    assert (done.text, done.reason) == ("", "stop")


def test_logprobs_are_the_models_own_whatever_may_be_drawn() -> None:
    """As vLLM tells them."""
    done = generation(Sampling(min_tokens=1, max_tokens=2, logprobs=2))
    values = logits([EOS, A, B])
    done.take(values)
    ((own, best),) = done.logprobs
    assert done.tokens == [A]
    assert list(best) == [EOS, A]
    whole = np.log(np.exp(values.astype(np.float64)).sum())
    assert own == best[A] == pytest.approx(2 - whole, abs=1e-5)
    assert best[EOS] == pytest.approx(3 - whole, abs=1e-5)
    assert values[EOS] == 3  # the caller's logits are as they were


@pytest.mark.parametrize("pieces", [[(0, 5)], [(0, 2), (2, 6)], [(0, 3), (0, 4), (3, 6)]])
def test_logprobs_of_the_prompt_however_it_was_read(pieces: list[tuple[int, int]]) -> None:
    """Rows begin again, and tell nothing twice."""
    done = generation(Sampling(prompt_logprobs=2))
    rows = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    rows[1] = np.round(rows[1])  # with equal ones
    for begin, end in pieces:
        done.read_prompt(rows[begin:end], begin)
    assert len(done.prompt_logprobs) == 5
    for (told, rank, best), row, token in zip(
        done.prompt_logprobs, rows.astype(np.float64)[:5], b"rompt", strict=True
    ):
        own = row - np.log(np.exp(row).sum())
        assert told == pytest.approx(own[token], abs=1e-5)
        assert rank == sum(value >= row[token] for value in row)
        first, second = sorted(range(256), key=lambda i: (-row[i], i))[:2]
        assert list(best) == [first, second]
        assert list(best.values()) == pytest.approx([own[first], own[second]], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "order", "reason", "told"),
    [
        ({}, [EOS], "stop", None),  # the tokenizer's own end
        ({}, [A], "stop", A),  # one of the configuration's
        ({"stop_token_ids": (B,)}, [B], "stop", B),
        ({"stop": ("c",)}, [C], "stop", "c"),
        ({"ignore_eos": True, "max_tokens": 1}, [A], "length", None),
    ],
)
def test_why_it_ended(
    changes: dict[str, Any], order: list[int], reason: str, told: str | int | None
) -> None:
    ends, named = frozenset({EOS, A}), frozenset({A})
    done = Generation(list(b"x"), Sampling(**changes), ends, Bytes(), 99, named)
    done.take(logits(order))
    assert (done.reason, done.stop_reason) == (reason, told)


@QUICK
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=8), stops=STOPS, data=st.data())
def test_stop_texts_over_pieces(pieces: list[str], stops: list[str], data: st.DataObject) -> None:
    early, included = data.draw(st.integers(0, len(pieces))), data.draw(st.booleans())
    stopped, text, told = StoppedText(stops, included), "", ""
    for number, piece in enumerate(pieces):
        before, text = len(text), text + piece
        ended = stopped.add(piece, search=number >= early)
        assert stopped.certain.startswith(told)
        at = None if number < early else stopped_at(text, stops, before)
        assert ended is (at is not None)
        told = stopped.certain
        if ended:
            assert stopped.found in stops and text.startswith(stopped.found, at)
            assert stopped.certain == text[:at] + (stopped.found if included else "")
            return
        held = text[len(stopped.certain) :]
        begun = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
        assert len(held) == max(begun, default=0)  # no more and no less than may begin a stop text
    stopped.release()
    assert stopped.certain == text


@QUICK
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=8), stops=STOPS, included=st.booleans())
def test_stop_texts_do_not_depend_on_the_pieces(
    pieces: list[str], stops: list[str], included: bool
) -> None:
    """Nor on how a client's stop texts lie in one another."""
    found = []
    for each in (pieces, "".join(pieces)):
        stopped = StoppedText(stops, included)
        ended = any(stopped.add(piece, search=True) for piece in each)
        found.append((ended, stopped.found, stopped.certain))
    assert found[0] == found[1]


class Spaced:
    """Tokens with spaces between, two of them added."""

    WORDS = ("zero", "<a>", "<b>", "three")

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(self.WORDS[i] for i in ids if i not in (1, 2) or not skip_special_tokens)

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {i: SimpleNamespace(content=self.WORDS[i]) for i in (1, 2)}


@pytest.mark.parametrize(
    ("skip", "spaces", "expected"),
    [
        (False, True, "zero <a> <b> three <b> zero"),
        (False, False, "zero <a><b> three <b> zero"),
        (True, False, "zero three zero"),
    ],
)
def test_spaces_between_special_tokens(skip: bool, spaces: bool, expected: str) -> None:
    sampling = Sampling(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    told = Detokenizer(Spaced(), sampling=sampling)
    assert "".join(map(told.add, (0, 1, 2, 3, 2, 0))) + told.rest() == expected


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([[0]], None),
        ([[1, 2, 3]], None),
        ([[1, 2, 3, 4]], "4 to 4 tokens"),
        ([[1], [1, 2, 3, 4]], "1 to 4 tokens"),
        ([[1], []], "0 to 1 tokens"),
        ([], "0 to 0 tokens"),
        ([[9], [0, 9]], None),
        ([[9], [0, 10]], "no such token(.|\n)*10(.|\n)*0 to 9"),
        ([[-1]], "no such token"),
    ],
)
def test_rows_that_are_refused(rows: list[list[int]], says: str | None) -> None:
    if says is None:
        check_rows(rows, 3, 10)
    else:
        with pytest.raises(EngineError, match=says):
            check_rows(rows, 3, 10)


def drawn(seed: int | None) -> list[int]:
    """Forty of a hundred equally likely tokens."""
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=seed)
    generation = Generation([65], sampling, frozenset({200}), Bytes(), room=99)
    logits = np.full(256, -np.inf, np.float32)
    logits[:100] = 0
    while generation.reason is None:
        generation.take(logits)
    return generation.tokens


def test_a_seed_makes_a_completion_repeatable() -> None:
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)
    assert set(drawn(3)) <= set(range(100))


def test_what_is_not_asked_for_bounds_nothing() -> None:
    values = asdict(Sampling())
    assert (values["temperature"], values["top_p"], values["top_k"]) == (0.0, 1.0, 0)
    assert (values["min_tokens"], values["ignore_eos"], values["stop"]) == (0, False, ())
    assert (values["seed"], values["logprobs"], values["max_tokens"]) == (None, None, 128)
