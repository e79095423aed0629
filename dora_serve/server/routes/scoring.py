"""`/score` and `/rerank`: how near texts are, by the cosine of their embeddings, or as a model says
that reads both and has one label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from ..state import state_of
from ..wire import answers
from ..wire.errors import ApiError
from ..wire.requests import RerankRequest, ScoreRequest
from .encoding import logits, run
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)

_TASKS = ("feature-extraction", "sequence-classification")


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
    head, near, used = await _near(body, request, first, second)
    data = [answers.Score(index=i, score=value) for i, value in enumerate(near)]
    return answers.Scores(**head, data=data, usage=used)


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(body: RerankRequest, request: Request) -> answers.Ranking:
    """The documents, the nearest to the query first."""
    head, near, used = await _near(body, request, [body.query], body.documents)
    order = np.argsort(-near, kind="stable").tolist()
    results = [
        answers.Ranked(
            index=i, document=answers.Document(text=body.documents[i]), relevance_score=near[i]
        )
        for i in order[: body.top_n or len(order)]
    ]
    return answers.Ranking(id=head["id"], model=head["model"], usage=used, results=results)


async def _near(
    body: ScoreRequest | RerankRequest,
    request: Request,
    first: Sequence[str],
    second: Sequence[str],
) -> tuple[dict[str, Any], Any, answers.Usage]:
    """How near every text of `second` is to its own of `first`, or to the only one there."""
    served, engine = state_of(request).models.encoder(body.model, *_TASKS)
    if served.model.task == _TASKS[0]:
        vector = engine.encoder.vector
        head, vectors, used = await run(request, served, engine, body, "score", vector)
        return head, _cosines(vectors[: len(first)], vectors[len(first) :]), used
    ones = [*first] * len(second) if len(first) == 1 else first
    pairs = list(zip(ones, second, strict=True))
    head, rows, used = await run(request, served, engine, body, "score", logits, pairs)
    told = np.array(rows)
    if told.shape[1] != 1:
        raise ApiError(
            f"The model `{served.model.name}` has {told.shape[1]} labels: one says how near texts "
            "are.",
            param="model",
            code="other_task",
        )
    if body.use_activation is not False:
        told = engine.encoder.probabilities(told)
    return head, told[:, 0].astype(np.float64), used


def _cosines(first: Sequence[Any], second: Sequence[Any]) -> Any:
    """Of every vector of `second` with its own of `first`, or with the only one there."""
    ones, others = np.array(first, np.float64), np.array(second, np.float64)
    lengths = np.linalg.norm(ones, axis=1) * np.linalg.norm(others, axis=1)
    return (ones * others).sum(axis=1) / np.maximum(lengths, 1e-8)
