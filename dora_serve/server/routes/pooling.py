"""`/pooling`: vectors or classes of texts, or of each of their tokens, as vLLM has it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from dora_serve.onnxruntime.encoder import STATES, Encoder
from dora_serve.onnxruntime.pipeline import normalized

from ..state import state_of
from ..wire import answers
from ..wire.errors import ApiError
from ..wire.requests import PoolingRequest
from ..wire.sending import beside
from .encoding import run, shortened
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)

# What may be asked of a model of each task; the first where nothing is said.
_TASKS = {
    "feature-extraction": ("embed", "token_embed"),
    "sequence-classification": ("classify",),
    "token-classification": ("token_classify",),
}


@router.post("/pooling", response_model=answers.Pooling)
async def pooling(body: PoolingRequest, request: Request) -> Response:
    """What the model tells of every text, or with `token_embed` and `token_classify` of every
    token."""
    served, engine = state_of(request).models.encoder(body.model, *_TASKS)
    tasks = _TASKS[served.model.task]
    task = body.task or tasks[0]
    if task not in tasks:
        raise ApiError(f"The model `{served.model.name}` takes {' or '.join(tasks)}.", param="task")
    if body.dimensions is not None and task != "embed":
        raise ApiError("only an embedding has some of its dimensions", param="dimensions")
    finish = engine.encoder.vector if task == "embed" else _FINISH[task]

    head, outputs, used = await run(request, served, engine, body, "pool", finish)

    def answer() -> answers.Pooling:
        told = [_told(engine.encoder, values, task, body) for values in outputs]
        data = [answers.Pooled(index=i, data=each) for i, each in enumerate(told)]
        return answers.Pooling(**head, data=data, usage=used)

    return await beside(answer)


def _told(encoder: Encoder, values: Any, task: str, body: PoolingRequest) -> Any:
    active = body.use_activation is not False
    if task == "embed":
        values = shortened(values, body, True)
    elif active:
        values = normalized(values) if task == "token_embed" else encoder.probabilities(values)
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return values.tolist()


def _states(row: dict[str, Any]) -> Any:
    return np.array(row[STATES])


def _logits(row: dict[str, Any]) -> Any:
    return np.array(row["logits"])


_FINISH: dict[str, Callable[[dict[str, Any]], Any]] = {
    "token_embed": _states,
    "classify": _logits,
    "token_classify": _logits,
}
