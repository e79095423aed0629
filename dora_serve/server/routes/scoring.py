"""`/score` and `/rerank`: how near texts are, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from ..state import state_of
from ..wire import answers
from ..wire.errors import ApiError
from ..wire.requests import RerankRequest, ScoreRequest
from .encoding import run
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.post("/score")
@router.post("/v1/score")
async def score(body: ScoreRequest, request: Request) -> answers.Scores:
    """How near each text of one side is to the one of the other side, or to the only one there."""
    first, second = body.sides
    if len(first) not in (1, len(second)):
        raise ApiError(
            f"{len(first)} texts on one side and {len(second)} on the other: give one, or as many",
            param="text_1",
        )
    head, vectors, used = await _embed(body, request)
    near = _cosines(vectors[: len(first)], vectors[len(first) :])
    data = [answers.Score(index=i, score=value) for i, value in enumerate(near)]
    return answers.Scores(**head, data=data, usage=used)


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(body: RerankRequest, request: Request) -> answers.Ranking:
    """The documents, the nearest to the query first."""
    head, vectors, used = await _embed(body, request)
    near = _cosines(vectors[:1], vectors[1:])
    order = np.argsort(-near, kind="stable").tolist()
    results = [
        answers.Ranked(
            index=i, document=answers.Document(text=body.documents[i]), relevance_score=near[i]
        )
        for i in order[: body.top_n or len(order)]
    ]
    return answers.Ranking(id=head["id"], model=head["model"], usage=used, results=results)


async def _embed(
    body: ScoreRequest | RerankRequest, request: Request
) -> tuple[dict[str, Any], list[Any], answers.Usage]:
    served, engine = state_of(request).models.encoder(body.model, "last_hidden_state", "embeddings")
    return await run(request, served, engine, body, "score", engine.encoder.vector)


def _cosines(first: Sequence[Any], second: Sequence[Any]) -> Any:
    """Of every vector of `second` with its own of `first`, or with the only one there."""
    ones, others = np.array(first, np.float64), np.array(second, np.float64)
    lengths = np.linalg.norm(ones, axis=1) * np.linalg.norm(others, axis=1)
    return (ones * others).sum(axis=1) / np.maximum(lengths, 1e-8)
