"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..state import state_of
from ..wire import answers
from ..wire.requests import DetokenizeRequest, TokenizeRequest
from .reading import JsonRoute, plain

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", response_model=answers.Tokens)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text, or of a conversation through the chat template."""
    served = state_of(request).models.find(body.model)
    messages = await plain(body.messages or ())
    answer = await served.texts.tokenize(
        messages or body.prompt or "",
        body.add_special_tokens,
        body.add_generation_prompt,
        served.engine.max_length,
        body.return_token_strs,
        body.template_values(),
        body.continue_final_message,
    )
    return Response(answer, media_type="application/json")


@router.post("/detokenize", response_model=answers.Text)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    served = state_of(request).models.find(body.model)
    answer = await served.texts.detokenize(body.tokens)
    return Response(answer, media_type="application/json")
