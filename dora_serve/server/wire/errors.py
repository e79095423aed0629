"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from converters.errors import DoraExportError
from dora_serve.onnxruntime.limits import QueueFull
from dora_serve.onnxruntime.session import EngineError

from .places import told

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

_log = logging.getLogger(__name__)


class Error(BaseModel):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is no success."""

    error: Error


class ApiError(Exception):
    """A request that gets `status` and a reason in place of an answer."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def content(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return ErrorAnswer(
            error=Error(message=str(self), type=kind, param=self.param, code=self.code)
        ).model_dump()

    def response(self) -> JSONResponse:
        from fastapi.responses import JSONResponse

        more = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
        return JSONResponse(self.content, self.status, more.get(self.status))


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of `error`: all of what the engine refuses, nothing of a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(str(error), 429, code="queue_full")
    if isinstance(error, EngineError):
        return ApiError(told(str(error)), 400, code="not_possible")
    if isinstance(error, DoraExportError):  # a file that was right when it was made
        return ApiError(told(str(error)), 503, code="model_unavailable")
    _log.error("a request failed", exc_info=error)
    return ApiError("internal error", 500)


def install(app: FastAPI) -> None:
    """Have `app` answer every error in this form."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        message = first["msg"]
        return ApiError(f"{place}: {message}" if place else message, param=place or None).response()

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        answer = ApiError(HTTPStatus(error.status_code).phrase, error.status_code).response()
        answer.headers.update(error.headers or {})
        return answer

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (ApiError, DoraExportError, Exception):
        app.add_exception_handler(kind, failed)


def event(error: Exception) -> bytes:
    """The error as a server-sent event, for an answer that has begun."""
    return b"data: " + json.dumps(as_api_error(error).content).encode() + b"\n\n"
