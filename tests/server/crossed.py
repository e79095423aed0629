"""Pairs for a model that reads both texts: more rows of `test_attacks.py`."""

from __future__ import annotations

from typing import Any

from tests.server.attacks import Attack, post

CROSS = "cross"
_TOO_LONG = "good film " * 20_000
_LONGEST = "a" * 900_000  # which each of many pairs has


def scores(*fine: int, **more: Any) -> Attack:
    return post("/score", lambda: {"model": CROSS, **more}, *fine)


def ranks(*fine: int, **more: Any) -> Attack:
    return post("/rerank", lambda: {"model": CROSS, "query": "good", **more}, *fine)


CROSSED: dict[str, Attack] = {
    "documents to read": ranks(200, documents=["good film"] * 256),
    "more documents than may be": ranks(documents=["good"] * 2049),
    "a million documents": ranks(documents=["a"] * 800_000),
    "documents of other types": ranks(documents=["a", 1, None, {}, ["b"]] * 90_000),
    "a query that each document has": ranks(query=_LONGEST, documents=["a"] * 256),
    "a query that is cut for each": ranks(
        200, 400, query=_LONGEST, documents=["a"] * 256, truncate_prompt_tokens=10
    ),
    "a long query that is cut for each": ranks(
        200, 400, query=_TOO_LONG, documents=["a"] * 256, truncate_prompt_tokens=10
    ),
    "a document of millions": ranks(documents=["a" * 4_000_000]),
    "long documents": ranks(documents=["good film " * 1500] * 250),
    "long documents that are cut": ranks(
        200, 400, documents=["good film " * 1500] * 250, truncate_prompt_tokens=10
    ),
    "a query of half a pair": ranks(query="\ud800", documents=["a"] * 9),
    "a document of half a pair": ranks(documents=["a", "\udfff"]),
    "no documents": ranks(documents=[]),
    "empty documents": ranks(200, documents=[""] * 256),
    "documents beside zeros and directions": ranks(
        *(200, 400), documents=["\0\u202e\ufeff\U000e0001" * 4] * 256
    ),
    "a bound of all": ranks(documents=["a"], top_n=10**30),
    "pairs of pairs": scores(text_1=["a"] * 2048, text_2=["b"] * 2048),
    "pairs of texts each": scores(200, text_1=["good"] * 256, text_2=["film"] * 256),
    "a side that all have": scores(text_1=_LONGEST, text_2=["a"] * 256),
    "long sides": scores(text_1=[_TOO_LONG] * 9, text_2=[_TOO_LONG] * 9),
    "sides of half pairs": scores(text_1=["\ud800"] * 99, text_2=["\udc00"] * 99),
    "sides of other types": scores(text_1=[1, {}], text_2=[["a"], None] * 90_000),
    "sides that do not fit each other": scores(text_1=["a", "b"], text_2=["c"] * 3),
    "sides of tokens": scores(text_1=[[5] * 999], text_2=[[5] * 999] * 256),
    "no sides": scores(text_1=[], text_2=[]),
}
