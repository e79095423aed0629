"""`/invocations`: any request, told apart by what it has."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError

from ..bounded.work import fault
from ..state import state_of
from ..wire.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Invocation,
    RerankRequest,
)
from . import encoding, generating, scoring
from .preparing import made
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.post("/invocations", response_model=None)
async def invocations(body: Invocation, request: Request) -> Any:
    """As the route for such a request answers it."""
    await made(request, body.root.model)
    return await _answer(body.root, request)


def _answer(asked: Any, request: Request) -> Awaitable[Any]:
    if isinstance(asked, ChatRequest):
        return generating.chat(asked, request)
    if isinstance(asked, CompletionRequest):
        return generating.completions(asked, request)
    if isinstance(asked, RerankRequest):
        return scoring.rerank(asked, request)
    if not isinstance(asked, EmbeddingRequest):
        return scoring.score(asked, request)
    if state_of(request).models.find(asked.model).model.task == "sequence-classification":
        return encoding.classify(_classified(asked), request)
    return encoding.embeddings(asked, request)


def _classified(asked: EmbeddingRequest) -> ClassifyRequest:
    """The request of the same texts for their classes. Raises for what vectors alone have."""
    try:
        return ClassifyRequest(**asked.model_dump(exclude_unset=True))
    except ValueError as error:
        raise RequestValidationError([fault(error)]) from None
