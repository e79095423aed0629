"""What was read stays in memory up to a number of bytes, of all runs together."""

from __future__ import annotations

import pytest
import torch

from converters.updates import memo
from converters.updates.memo import Memo
from converters.updates.replaced import Replacement

SIZE = 400


def update(size: int = SIZE) -> Replacement:
    return Replacement(torch.zeros(1, size // 4))


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Memo:
    """Room for three updates, none of which is there."""
    monkeypatch.setattr(memo, "MOST_BYTES", 0)
    owner = Memo()
    owner.remember("last", update(4))
    monkeypatch.setattr(memo, "MOST_BYTES", 3 * SIZE + 4)
    return owner


def held(*owners: Memo) -> list[str]:
    names = "abcdefg"
    assert memo._total == sum(memo._sizes.values())
    return [name for owner in owners for name in names if owner.get(name) is not None]


def test_those_remembered_longest_ago_go_first_whosever_they_are(empty: Memo) -> None:
    one, other = Memo(), Memo()
    first = update()
    for name, owner in zip("abc", (one, other, one), strict=True):
        owner.remember(name, first)
    assert one.get("a") is first
    assert empty.get("last") is not None  # it fits to the last byte
    assert held(one, other) == ["a", "c", "b"]
    one.remember("a", update())  # again: counted once, and the newest now
    assert one.get("a") is not first
    assert held(one, other) == ["a", "c", "b"]
    other.remember("d", update())
    assert held(one, other) == ["a", "c", "d"]
    other.remember("e", update(2 * SIZE))
    assert held(one, other) == ["d", "e"]


def test_the_last_one_stays_however_large() -> None:
    one = Memo()
    one.remember("a", update())
    one.remember("b", update(100 * SIZE))
    assert held(one) == ["b"]
    one.remember("c", update())
    assert held(one) == ["c"]


def test_a_run_that_is_gone_takes_what_it_held_along() -> None:
    one, gone = Memo(), Memo()
    gone.remember("a", update())
    del gone
    for name in "bcd":
        one.remember(name, update())
    assert held(one) == ["b", "c", "d"]


def test_the_allowance_is_a_quarter_of_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert memo.MOST_BYTES == 268_435_456
