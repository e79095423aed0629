"""The server's side of `work.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

from converters.files.interpreters import environment

from ..turns import Turns
from ..wire.errors import ApiError
from .work import MEMORY, SECONDS, sizes, write_frame

_WALL = 20  # seconds for a call, whatever it waits for
_START = 120  # seconds for a process to begin, on a machine with much else to do
_WAITING = 256  # calls, with the one that runs
_ENDED = (OSError, EOFError, TimeoutError)
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}


class Process:
    """Does the calls of `work.Work` with these arguments, one after the other. A call that
    takes more than it may ends the process, and the next call has another, for which what the first
    has read of the model's folder may not have changed. `template`: the text of the chat template
    in place of the model's own."""

    def __init__(self, *folder: str, template: str | None = None) -> None:
        self._folder, self._template = folder, template
        self._read: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._turns = Turns(_WAITING)

    async def call(self, name: str, blob: bytes = b"", **given: Any) -> tuple[Any, bytes]:
        """What the call returns. Raises `ApiError` as it does, 400 when it takes more than it may,
        429 when too many wait."""
        async with self._turns.take():
            told, more = await self._ask(write_frame({"call": name, **given}, blob))
        if "error" in told:
            raise ApiError(*told["error"])
        return told["answer"], more

    async def start(self) -> None:
        """Have the process ready, so that the first call need not wait for it."""
        async with self._turns.take():
            if self._process is None:
                await self._begin()

    async def _begin(self) -> asyncio.subprocess.Process:
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        command = [sys.executable, "-m", f"{__package__}.work", *self._folder]
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment() | _ENVIRONMENT
            )
            async with asyncio.timeout(_START):
                told, _ = await _read(process)
                if self._template is not None:
                    assert process.stdin is not None
                    frame = write_frame({"call": "template"}, self._template.encode())
                    process.stdin.write(frame)
                    await process.stdin.drain()
                    await _read(process)
            if self._read not in (None, told):
                message = "the files that read its texts are others since the server began"
                raise ApiError(f"{message}: start it anew", 503, "model", "model_unavailable")
            self._read = told
        except BaseException as error:
            await self.close()
            if not isinstance(error, _ENDED):
                raise
            message = "the process that reads texts could not be started"
            raise ApiError(message, 503, code="not_ready") from None
        return process

    async def _ask(self, frame: bytes) -> tuple[Any, bytes]:
        if self._process is not None and self._process.returncode is not None:
            self._process = None
        process = self._process or await self._begin()
        try:
            async with asyncio.timeout(_WALL):
                assert process.stdin is not None
                process.stdin.write(frame)
                await process.stdin.drain()
                return await _read(process)
        except BaseException as error:  # what it would answer later is no other call's answer
            await self.close()
            if not isinstance(error, _ENDED):
                raise
            raise ApiError(
                f"this takes more than {SECONDS} s or {MEMORY >> 20} MB", code="too_expensive"
            ) from None

    async def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


async def _read(process: asyncio.subprocess.Process) -> tuple[Any, bytes]:
    assert process.stdout is not None
    told, blob = sizes(await process.stdout.readexactly(8))
    return json.loads(await process.stdout.readexactly(told)), await process.stdout.readexactly(
        blob
    )
