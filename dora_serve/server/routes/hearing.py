"""`/v1/audio/transcriptions` and `/v1/audio/translations`: speech in, text out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ..bounded.work import fault
from ..state import note, state_of
from ..wire import answers
from ..wire.errors import ApiError
from ..wire.requests import TranscriptionRequest
from ..wire.sending import while_there
from ..wire.sounds import read_form, read_sound
from .preparing import made

router = APIRouter()
_PROPERTIES = {
    "file": {"type": "string", "format": "binary"},
    "model": {"type": "string"},
    "language": {"type": "string"},
    "prompt": {"type": "string"},
    "response_format": {"enum": ["json", "text"]},
    "temperature": {"enum": ["0"]},
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": _PROPERTIES,
                    "required": ["file", "model"],
                }
            }
        },
    }
}


@router.post("/v1/audio/transcriptions", response_model=answers.Transcription, openapi_extra=_FORM)
async def transcriptions(request: Request) -> Response:
    """What is said in a WAV file."""
    return await _heard(request, "transcribe")


@router.post("/v1/audio/translations", response_model=answers.Transcription, openapi_extra=_FORM)
async def translations(request: Request) -> Response:
    """The same in English."""
    return await _heard(request, "translate")


async def _heard(request: Request, task: str) -> Response:
    state = state_of(request)
    kind, sent = request.headers.get("content-type", ""), await request.body()
    form = await asyncio.to_thread(read_form, kind, sent)
    file = form.pop("file", None)
    if file is None:
        raise ApiError("the form has no file", param="file")
    try:
        body = TranscriptionRequest.model_validate(
            {name.removesuffix("[]"): value.decode() for name, value in form.items()}
        )
    except ValueError as error:
        raise RequestValidationError([fault(error)]) from None
    await made(request, body.model)
    served, engine = state.models.transcriber(body.model)
    spectrum = engine.model.spectrum
    wave = partial(read_sound, file, spectrum.rate, spectrum.longest)
    samples = len(await asyncio.to_thread(wave))
    # With a blank before it, as Whisper was trained: a text goes on with what came before.
    said = [f" {body.prompt.strip()}"] if body.prompt else []
    rows = await served.texts.encode(said, 224, "prompt", False)
    prompt = rows[0][0] if rows else []
    search = None
    if body.max_completion_tokens is not None:
        search = replace(engine.model.usual, max_tokens=body.max_completion_tokens)
    begin = time.monotonic()
    asked = engine.submit(wave, served.model.adapter, body.language, task, search, prompt)
    served.requests += 1
    state.metrics.asked(served.model, [])
    note(request, model=served.model.name, samples=samples)
    try:
        async with asyncio.timeout(state.options.timeout):
            done = await while_there(request, asyncio.wrap_future(asked))
    except TimeoutError:
        raise ApiError("the answer took too long", 504, code="timeout") from None
    state.metrics.grew(served.model, len(done.tokens))
    state.metrics.answered(served.model, done.reason, time.monotonic() - begin)
    text = done.text.strip()
    if body.response_format == "text":
        return PlainTextResponse(text)
    used = answers.Heard(seconds=ceil(samples / spectrum.rate))
    return JSONResponse(answers.Transcription(text=text, usage=used).model_dump())
