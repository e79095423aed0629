"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ..state import state_of
from ..wire import answers
from ..wire.requests import DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post("/tokenize")
def tokenize(body: TokenizeRequest, request: Request) -> answers.Tokens:
    """The tokens of a text, or of a conversation through the chat template."""
    served = state_of(request).models.find(body.model)
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        text = served.template.render(messages, body.add_generation_prompt)
    else:
        text = body.prompt or ""
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    encoded = served.engine.tokenizer.encode(text, add_special_tokens=special)
    return answers.Tokens(
        count=len(encoded.ids),
        max_model_len=served.engine.max_length,
        tokens=list(encoded.ids),
        token_strs=list(encoded.tokens) if body.return_token_strs else None,
    )


@router.post("/detokenize")
def detokenize(body: DetokenizeRequest, request: Request) -> answers.Text:
    """The text of tokens."""
    served = state_of(request).models.find(body.model)
    return answers.Text(
        prompt=served.engine.tokenizer.decode(body.tokens, skip_special_tokens=False)
    )
