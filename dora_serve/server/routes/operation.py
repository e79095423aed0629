"""What is served, and whether it is well: `/v1/models`, `/health`, `/ready`, `/metrics`."""

from __future__ import annotations

from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from converters.files.json_files import read_json
from dora_serve.onnxruntime.encoder_queue import EncoderQueue
from dora_serve.onnxruntime.transcriber_queue import TranscriberQueue

from ..prepare.offer import HEARS
from ..registry import Served
from ..state import state_of
from ..wire import answers
from ..wire.errors import ApiError, ErrorAnswer
from ..wire.places import told

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
    state = state_of(request)
    problems = {name: told(why, state.root) for name, why in state.models.problems.items()}
    return answers.DetailsList(
        data=[_details(served) for served in state.models], not_served=problems
    )


def _card(served: Served) -> answers.ModelCard:
    return answers.ModelCard(
        id=served.model.name,
        created=served.created,
        root=served.model.base or served.model.name,
        parent=served.model.base,
        max_model_len=served.engine.max_length,
    )


def _details(served: Served) -> answers.ModelDetails:
    model, engine = served.model, served.engine
    return answers.ModelDetails(
        id=model.name,
        kind=model.kind,
        method=model.method,
        task=HEARS if isinstance(engine, TranscriberQueue) else model.task,
        base=model.base,
        parameters=model.parameters,
        bytes=model.bytes,
        modules=model.modules,
        requests=served.requests,
        loaded=not model.adapted or (model.adapter or "") in served.engine.pool,
        chat=served.chat,
        labels=engine.encoder.labels if isinstance(engine, EncoderQueue) else [],
    )


@router.get("/health")
async def health() -> answers.Status:
    """The process answers."""
    return answers.Status()


@router.get("/ping", response_class=Response)
@router.post("/ping", response_class=Response)
async def ping() -> Response:
    """The same, as SageMaker asks it."""
    return Response()


@router.get("/version")
async def version() -> answers.Version:
    """Of this server."""
    return answers.Version(version=package_version("dora-serve"))


@router.get("/load")
async def load(request: Request) -> answers.Load:
    """How much is to be done."""
    engines = [engine for _, engine in state_of(request).models.engines()]
    return answers.Load(server_load=sum(each.running + each.waiting for each in engines))


@router.get("/tokenizer_info")
def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """What the tokenizer's own file says of it, and the chat template; `model` may be left out
    where there is one base."""
    from ..chat_template import ChatTemplate

    models = state_of(request).models
    folders = {served.model.folder for served in models}
    if model is not None:
        folders = {models.find(model).model.folder}
    if len(folders) != 1:
        raise ApiError("there are several tokenizers: name a model", param="model")
    folder = Path(folders.pop())
    path = folder / "tokenizer_config.json"
    said: dict[str, Any] = read_json(path) if path.exists() else {}
    text = ChatTemplate(folder, models.template).text
    chat = {} if text is None else {"chat_template": text}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **said, **chat}


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


@router.get("/openapi.json", include_in_schema=False)
def openapi(request: Request) -> Response:
    """All of it. To write it takes a second or two, once, which FastAPI's own has all others
    wait."""
    return JSONResponse(request.app.openapi())
