"""What is served, and whether it is well: `/v1/models`, `/health`, `/ready`, `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ..registry import Served
from ..state import state_of
from ..wire import answers
from ..wire.errors import ApiError, ErrorAnswer

router = APIRouter()


@router.get("/v1/models")
def models(request: Request) -> answers.ModelList:
    """Every name that a request may give as its model."""
    return answers.ModelList(data=[_card(served) for served in state_of(request).models])


@router.get("/v1/models/{name:path}")
def model(name: str, request: Request) -> answers.ModelCard:
    """One of them."""
    return _card(state_of(request).models.find(name))


@router.get("/dora/models")
def details(request: Request) -> answers.DetailsList:
    """The same names with what each is: ranks, sizes, requests so far."""
    return answers.DetailsList(data=[_details(served) for served in state_of(request).models])


def _card(served: Served) -> answers.ModelCard:
    return answers.ModelCard(
        id=served.model.name,
        created=served.created,
        root=served.model.base or served.model.name,
        parent=served.model.base,
        max_model_len=served.engine.max_length,
    )


def _details(served: Served) -> answers.ModelDetails:
    model = served.model
    return answers.ModelDetails(
        id=model.name,
        kind=model.kind,
        method=model.method,
        task=model.task,
        base=model.base,
        parameters=model.parameters,
        bytes=model.bytes,
        modules=model.modules,
        requests=served.requests,
        loaded=model.adapter is None or model.adapter in served.engine.pool,
    )


@router.get("/health")
async def health() -> answers.Status:
    """The process answers."""
    return answers.Status()


@router.get("/ready", responses={503: {"model": ErrorAnswer}})
async def ready(request: Request) -> answers.Status:
    """Requests are taken; 503 before that, and once the server is ending."""
    if not state_of(request).ready:
        raise ApiError("not ready", 503, code="not_ready")
    return answers.Status()


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """For Prometheus."""
    text = generate_latest(state_of(request).metrics.registry)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
