"""Keys and values that are kept: tokens and logits are those of a row that computes them all."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dora_serve.onnxruntime.adapter_set import AdapterSet
from dora_serve.onnxruntime.continuous import ContinuousDecoder
from dora_serve.onnxruntime.decoder import Decoder
from dora_serve.onnxruntime.prefixes import Prefixes
from dora_serve.onnxruntime.request import Request
from dora_serve.onnxruntime.sampling import Sampling
from dora_serve.onnxruntime.slots import BLOCK
from tests.engines.decoders import Case
from tests.engines.test_continuous import Answer, file, running
from tests.engines.test_onnx_decoder import llama
from tests.engines.test_onnx_lengths import exported

__all__ = ["llama"]
TOLD = 3  # log-probabilities of every step


def ask(
    engine: ContinuousDecoder, ids: Sequence[int], path: str | None, count: int = 8
) -> tuple[Request, list[int], list[dict[int, float]]]:
    """The request, its tokens, and at every step the likeliest with their log-probabilities."""
    answer, told = Answer(), []
    tokens: list[int] = []
    sampling = Sampling(max_tokens=count, ignore_eos=True, logprobs=TOLD)
    (request,) = engine.submit(ids, path, [sampling], [answer.updates.put])
    while True:
        update = answer.updates.get(timeout=60)
        if update.error is not None:
            raise update.error
        tokens += update.tokens
        told += [best for _, best in update.logprobs]
        if update.reason is not None:
            return request, tokens, told


def words(choose: random.Random, count: int) -> list[int]:
    return choose.choices(range(3, 80), k=count)


def talk(case: Case, engine: ContinuousDecoder, turns: int, seed: int) -> list[int | None]:
    """Conversations of all adapters, turn by turn, beside an engine that keeps nothing; how many
    tokens of each prompt were kept."""
    names = [None, *case.runs]
    histories: dict[str | None, list[int]] = dict.fromkeys(names, [5] * (BLOCK + 2))
    choose, cached = random.Random(seed), []
    with running(case, prefix_bytes=0) as forgetful:
        for _ in range(turns):
            for name in choose.sample(names, len(names)):
                prompt = histories[name] + words(choose, 3)
                request, tokens, told = ask(engine, prompt, file(case, name))
                plain, expected, truth = ask(forgetful, prompt, file(case, name))
                assert tokens == expected
                for found, right in zip(told, truth, strict=True):
                    assert found.keys() == right.keys()
                    assert found == pytest.approx(right, abs=1e-5)
                assert plain.cached == 0
                histories[name] = prompt + tokens
                cached.append(request.cached)
    return cached


def test_turns_of_mixed_adapters(llama: Case) -> None:
    with running(llama, piece=7) as engine:
        cached = talk(llama, engine, turns=4, seed=0)
        assert cached[:3] == [0, 0, 0]  # the same tokens of other adapters
        # What was said and answered, but for the last token, which is in no cache yet.
        said = [BLOCK + 2 + 11 * turn - 1 for turn in range(4)]
        assert cached[3:] == [n // BLOCK * BLOCK for n in said[1:] for _ in range(3)]
        assert engine.prefixes.hits == sum(n or 0 for n in cached)


@pytest.mark.parametrize("broken", ["constant", "name"])
def test_keys_of_another_adapter_would_be_found(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "constant":
        monkeypatch.setattr(AdapterSet, "digest", lambda *_: b"all the same")
        with running(llama) as engine, pytest.raises(AssertionError):
            talk(llama, engine, turns=2, seed=0)
    else:
        monkeypatch.setattr(AdapterSet, "digest", lambda _, name: str(name).encode())
        with pytest.raises(AssertionError):
            replaced(llama, tmp_path)


def telling(case: Case) -> list[int]:
    """A prompt of 36 tokens that the runs answer differently."""
    decoder, sampling = Decoder(case.folder, threads=1), Sampling(max_tokens=8, ignore_eos=True)
    for seed in range(100):
        prompt = words(random.Random(seed), 36)
        told = [decoder.generate([prompt], name, sampling)[0].tokens for name in case.runs]
        if told[0] != told[1]:
            return prompt
    raise AssertionError("no prompt tells them apart")


def replaced(case: Case, folder: Path) -> None:
    """One adapter after the other under one name; each time the first comes back."""
    path, prompt = folder / "one.onnx_adapter", telling(case)
    with running(case, prefix_bytes=0) as forgetful:
        truth = {n: ask(forgetful, prompt, file(case, n))[1] for n in ("down", "second")}
    assert truth["down"] != truth["second"]  # the control
    cached = []
    with running(case) as engine:
        for name in ("down", "second", "down", "second"):
            shutil.copyfile(str(file(case, name)), path)
            engine.pool.forget(str(path))
            request, tokens, _ = ask(engine, prompt, str(path))
            assert tokens == truth[name]
            cached.append(request.cached)
    assert cached == [0, 0, 32, 32]


def test_the_digest_is_of_what_has_the_name_now(llama: Case) -> None:
    adapters = Decoder(llama.folder, threads=1).adapter_set
    first, second = (adapters.digest(name) for name in ("down", "second"))
    adapters.add("down", Path(str(file(llama, "second"))))
    assert adapters.digest("down") == second != first


def test_an_adapter_replaced_under_its_name(llama: Case, tmp_path: Path) -> None:
    replaced(llama, tmp_path)


def test_adapters_that_come_and_go(llama: Case, tmp_path: Path) -> None:
    paths = [shutil.copyfile(str(file(llama, "down")), tmp_path / str(i)) for i in range(3)]
    paths += [shutil.copyfile(str(file(llama, "second")), tmp_path / "other")]
    room = max(path.stat().st_size for path in paths)  # for one adapter at a time
    prompt = telling(llama)
    with running(llama, adapter_bytes=room) as engine:
        asked = [ask(engine, prompt, str(path)) for path in (*paths, *paths)]
    # One content is one adapter, whatever it is called and how often it is loaded.
    assert [request.cached for request, *_ in asked] == [0, 32, 32, 0, 32, 32, 32, 32]
    decoder = Decoder(llama.folder, threads=1)
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    truth = [decoder.generate([prompt], n, sampling)[0].tokens for n in ("down", "second")]
    assert truth[0] != truth[1]  # the control
    assert [tokens for _, tokens, _ in asked] == [*[truth[0]] * 3, truth[1]] * 2


def test_the_least_used_are_forgotten(llama: Case) -> None:
    decoder, choose = Decoder(llama.folder, threads=1), random.Random(0)
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    systems = [words(choose, 2 * BLOCK + i) for i in range(4)]
    with running(llama) as engine:
        size = BLOCK * engine.slots.token_bytes
    with running(llama, prefix_bytes=7 * size) as engine:
        for _ in range(40):
            prompt = choose.choice(systems) + words(choose, 4)
            name = choose.choice([None, *llama.runs])
            _, tokens, _ = ask(engine, prompt, file(llama, name), 4)
            assert tokens == decoder.generate([prompt], name, sampling)[0].tokens
            assert len(engine.prefixes._places) <= 7
        assert 0 < engine.prefixes.hits < engine.prefixes.queries // 2
        # The beginning of a text is forgotten after its end.
        long = words(choose, 58)
        ask(engine, long, None, 4)
        ask(engine, words(choose, 3 * BLOCK + 1), None, 4)
        ask(engine, words(choose, 2 * BLOCK + 1), None, 4)
        assert ask(engine, long, None, 4)[0].cached == 2 * BLOCK
    with running(llama, prefix_bytes=size - 1) as engine:
        prompt = words(choose, 40)
        assert [ask(engine, prompt, None)[0].cached for _ in range(2)] == [0, 0]


def test_rows_that_share_a_beginning_at_once(llama: Case) -> None:
    decoder, choose = Decoder(llama.folder, threads=1), random.Random(1)
    system = words(choose, 2 * BLOCK)
    asked = [(system + words(choose, 5), (None, "down", "second")[i % 3]) for i in range(12)]
    sampling = Sampling(max_tokens=9, ignore_eos=True)
    with running(llama, max_rows=4, piece=5) as engine:
        answers = [Answer() for _ in asked]
        requests = [
            engine.submit(ids, file(llama, name), [sampling], [answer.updates.put])[0]
            for (ids, name), answer in zip(asked, answers, strict=True)
        ]
        found = [answer.wait()[0] for answer in answers]
    assert found == [decoder.generate([ids], name, sampling)[0].tokens for ids, name in asked]
    assert [request.cached for request in requests] == [0] * 3 + [2 * BLOCK] * 9


def test_what_is_told_of_a_prompt_is_computed(llama: Case) -> None:
    prompt = [5, 9, 11, 7] * 9
    with running(llama) as engine:
        ask(engine, prompt, None)
        answer = Answer()
        told = Sampling(max_tokens=1, prompt_logprobs=1)
        (request,) = engine.submit(prompt, None, [told], [answer.updates.put])
        assert len(answer.updates.get(timeout=60).prompt_logprobs) == len(prompt) - 1
        assert request.cached == 0
        assert ask(engine, prompt, None)[0].cached == 32


@pytest.fixture(
    scope="module",
    params=["phi3-longrope", pytest.param("gemma3", marks=pytest.mark.further)],
)
def bordered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model with a window, or another form of its embedding, at 24 tokens."""
    return exported(request.param, tmp_path_factory)


def test_windows_and_borders(bordered: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(bordered, piece=7) as engine:
        cached = talk(bordered, engine, turns=5, seed=0)
        border = engine.graph.border
    assert cached[-1] == 48
    if border is not None:
        assert cached[3:6] == [16, 16, 16]  # kept once the first turn had crossed the border
        load = Prefixes.load

        def careless(self: Prefixes, kind: bytes, tokens: Sequence[int], slot: int) -> int:
            return load(self, kind[:-1] + b"\0", tokens, slot)

        monkeypatch.setattr(Prefixes, "load", careless)
        with running(bordered, piece=7) as engine, pytest.raises(AssertionError):
            talk(bordered, engine, turns=5, seed=0)


@pytest.mark.further
def test_five_hundred_requests(llama: Case, tmp_path: Path) -> None:
    """Conversations, shared beginnings and adapters that come, go and change, in little memory."""
    choose, decoder = random.Random(0), Decoder(llama.folder, threads=1)
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    paths, holds = [tmp_path / str(i) for i in range(4)], {}
    with running(llama) as engine:
        size = BLOCK * engine.slots.token_bytes
    systems = [words(choose, 20 + i) for i in range(6)]

    def rounds(engine: ContinuousDecoder, count: int) -> Iterator[int]:
        for _ in range(count):
            path = choose.choice(paths)
            if path not in holds or choose.random() < 0.2:
                holds[path] = choose.choice(list(llama.runs))
                shutil.copyfile(str(file(llama, holds[path])), path)
                engine.pool.forget(str(path))
            prompt = choose.choice(systems) + words(choose, choose.randint(1, 12))
            request, tokens, _ = ask(engine, prompt, str(path), 6)
            assert tokens == decoder.generate([prompt], holds[path], sampling)[0].tokens
            yield request.cached or 0

    room = 2 * max(Path(str(file(llama, n))).stat().st_size for n in llama.runs)
    with running(llama, prefix_bytes=20 * size, adapter_bytes=room) as engine:
        sum(rounds(engine, 200))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert sum(rounds(engine, 300)) > 0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 10
