"""`/dora/answer`: models that find the part of a text that answers a question."""

from __future__ import annotations

from math import exp
from typing import Any

from fastapi import APIRouter, Request

from dora_serve.onnxruntime.encoder import likeliest_span

from ..prepare.offer import ANSWERS
from ..state import state_of
from ..wire import answers
from ..wire.requests import AnswerRequest
from .encoding import computed
from .reading import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.post("/dora/answer")
async def answer(body: AnswerRequest, request: Request) -> answers.Answer:
    """The likeliest part of the context; vLLM serves no such model."""
    served, engine = state_of(request).models.encoder(body.model, ANSWERS)
    asked = await served.texts.question(body.question, body.context, engine.max_length)

    def finish(outputs: dict[str, Any]) -> tuple[int, int, float]:
        inside = [bool(each) for each in asked.inside]
        return likeliest_span(outputs, inside, body.max_answer_tokens)

    head, (found,), used = await computed(request, served, engine, [asked.row], "answer", finish)
    first, last, logprob = found
    start, end = asked.starts[first], asked.ends[last]
    text = body.context[start:end]
    return answers.Answer(**head, answer=text, start=start, end=end, score=exp(logprob), usage=used)
