"""Adapters in memory whatever is asked for in whatever order: those in use stay, the others go when
there is need, the longest unused first."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dora_serve import DoraExportError
from dora_serve.onnxruntime.adapter_pool import AdapterPool

ROOM = 5
SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 6}


class Engine:
    def __init__(self) -> None:
        self.loaded: set[str] = set()

    def add_adapter(self, name: str, path: str) -> None:
        assert name == path and name not in self.loaded
        self.loaded.add(name)

    def remove_adapter(self, name: str) -> None:
        self.loaded.remove(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name, size in SIZES.items():
        (folder / name).write_bytes(bytes(size))
    return folder


def pool_of(engine: Any) -> AdapterPool:
    return AdapterPool(engine, ROOM)


def steps(text: str) -> list[tuple[str, str]]:
    """`+a -a !a`: acquire, release and forget a."""
    words = {"+": "acquire", "-": "release", "!": "forget"}
    return [(words[each[0]], each[1]) for each in text.split()]


@given(
    st.lists(st.tuples(st.sampled_from(["acquire", "release", "forget"]), st.sampled_from("abcd")))
)
@example(steps("+b -b +c"))  # together they fill it
@example(steps("+a -a +b -b +a -a +c"))  # the longest unused is not the first that came
@example(steps("+a -a !a +b -b +a -a +b"))  # what was forgotten comes again, and stays
def test_any_order(folder: Path, asked: list[tuple[str, str]]) -> None:
    engine = Engine()
    pool = pool_of(engine)
    users, since, unwanted = Counter[str](), dict[str, int](), set[str]()
    sizes = {str(folder / name): size for name, size in SIZES.items()}
    for now, (what, name) in enumerate(asked):
        path, before = str(folder / name), set(engine.loaded)
        if what == "release" and users[path]:
            pool.release(path)
            users[path] -= 1
        elif what == "forget":
            pool.forget(path)
            unwanted |= {path} & before
        elif what == "acquire":
            gone = {each for each in unwanted if not users[each]}
            unwanted -= gone
            held = sum(size for each, size in sizes.items() if users[each] and each != path)
            fits = held + sizes[path] <= ROOM
            assert pool.acquire(path) is fits
            left = before - gone - engine.loaded
            if fits:
                users[path], since[path] = users[path] + 1, now
                for each in left:  # it had to go, and those before it had not been enough
                    later = {other for other in left if since[other] >= since[each]}
                    kept = (before - gone - left) | later | {path}
                    assert sum(sizes[other] for other in kept) > ROOM
                    assert not any(
                        since[other] < since[each]
                        for other in engine.loaded - {path}
                        if not users[other]
                    )
            assert not gone & (engine.loaded - {path})
        assert {each for each in users if users[each]} <= engine.loaded
        assert pool.bytes == sum(sizes[each] for each in engine.loaded) <= ROOM
    pool.forget(str(folder / "a"))
    assert pool.acquire(None)
    assert (str(folder / "a") in pool) is (users[str(folder / "a")] > 0)


def test_what_cannot_be_loaded(folder: Path) -> None:
    pool = pool_of(Engine())
    with pytest.raises(DoraExportError, match="larger than the memory") as caught:
        pool.acquire(str(folder / "e"))
    assert str(caught.value.found) == "6 bytes"
    with pytest.raises(DoraExportError, match="is gone"):
        pool.acquire(str(folder / "nothing"))
    assert pool.acquire(str(folder / "d"))
    assert str(folder / "e") not in pool


def test_who_answers_clients_does_not_wait_for_an_adapter_that_is_loaded(folder: Path) -> None:
    """A large one takes seconds."""
    begun, told = Event(), Event()

    class Slow(Engine):
        def add_adapter(self, name: str, path: str) -> None:
            begun.set()
            assert told.wait(60)
            super().add_adapter(name, path)

    pool, path, other = pool_of(Slow()), str(folder / "a"), str(folder / "b")
    loading = Thread(target=pool.acquire, args=(path,))
    loading.start()
    assert begun.wait(60)

    def tell() -> None:
        pool.expect(other, "")
        pool.forget(path)
        told.set()

    Thread(target=tell, daemon=True).start()
    loading.join(60)
    assert path in pool  # who acquired it has it
    pool.release(path)
    pool.acquire(None)
    assert path not in pool
