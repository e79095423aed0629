"""The process itself, asked by `process.py`:
`python -m dora_serve.server.bounded.work FOLDER`.

It runs what the makers of FOLDER wrote: a chat template is a program, and so are a tokenizer's
patterns. Without FOLDER it reads bodies, and grammars. The kernel bounds every call's memory and
its time of the processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from converters.errors import DoraExportError
from converters.files.handles import check_file
from dora_serve.onnxruntime.session import OnnxFolder

from ..chat_template import ChatTemplate
from ..wire import answers, requests, responses
from ..wire.errors import ApiError, as_api_error

SECONDS = 5  # of the processor
MEMORY = 192 << 20  # bytes, beyond what the process has when it is ready
LONGEST = 1 << 20  # characters of a text

BODIES = {**vars(requests), **vars(responses)}
_FORM = re.compile(r"str|constrained-\w+|(list|literal|function-\w+)\[.*")
_SIZES = struct.Struct("<II")  # bytes of the JSON, and of what follows it


def write_frame(answer: object, blob: bytes = b"") -> bytes:
    """JSON with bytes behind it, as one process tells it to the other."""
    told = json.dumps(answer).encode()
    return _SIZES.pack(len(told), len(blob)) + told + blob


def sizes(head: bytes) -> tuple[int, int]:
    """How many bytes of JSON, and how many behind it, follow the eight of `head`."""
    told, blob = _SIZES.unpack(head)
    return told, blob


def read_body(kind: type[BaseModel], body: bytes) -> BaseModel:
    """The request in `body`. Raises `ValidationError`, or `ValueError` for what is no JSON."""
    return kind.model_validate(from_json(body, allow_inf_nan=False))


def fault(error: ValueError) -> dict[str, Any]:
    """What is wrong first, as FastAPI's errors say it, of an error that `read_body` raised."""
    if not isinstance(error, ValidationError):
        return {"type": "json_invalid", "loc": ["body"], "msg": "the body is not JSON"}
    first = _telling(error.errors(include_url=False, include_context=False, include_input=False))
    place = first["loc"]
    place = (*place[:1], *place[1 + _is_form(place[1:2]) :])
    return {
        "type": first["type"],
        "loc": ["body", *(str(part)[:100] for part in place[:8])],
        "msg": first["msg"].removeprefix("Value error, ")[:300],
    }


def _telling(errors: Sequence[Any]) -> Any:
    """The first of `errors`; where its parameter takes several forms, as `prompt` does, that of the
    form that was meant: it fails by more than its kind, or further on than the others."""
    place = errors[0]["loc"]
    if not _is_form(place[1:2]):
        return errors[0]

    def meant(one: Any) -> tuple[bool, int]:
        counted = [part for part in one["loc"] if isinstance(part, int)]
        return not one["type"].endswith(("_type", "_parsing")), max(counted, default=-1)

    return max((each for each in errors if each["loc"][0] == place[0]), key=meant)


def _is_form(parts: Sequence[object]) -> bool:
    """Whether that, of an error's place, is pydantic's word for a form and no name of the API's."""
    return bool(parts) and _FORM.fullmatch(str(parts[0])) is not None


def check(blob: bytes, kind: str) -> tuple[Any, bytes]:
    """What is wrong with a body, None when nothing is."""
    try:
        read_body(BODIES[kind], blob)
    except ValueError as error:
        return fault(error), b""
    return None, b""


class Work:
    """The calls for a model, by name: each returns something that JSON can tell, and bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = OnnxFolder(folder)
        self._template = ChatTemplate(folder)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._folder.tokenizer

    def ready(self) -> str:
        """Have the folder's files read: a digest of what they say. One that cannot be is an error
        of the calls that need it"""
        read = sha256()
        with contextlib.suppress(Exception):
            self._tokenizer.encode("")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if check_file(file := self._folder.folder / name):
                    read.update(file.read_bytes())
        with contextlib.suppress(Exception):
            read.update(self._template.said().encode())
        return read.hexdigest()

    def template(self, blob: bytes) -> tuple[Any, bytes]:
        """Take the chat template that `blob` is in place of the folder's own."""
        self._template = ChatTemplate(self._folder.folder, blob.decode())
        return None, b""

    def encode(
        self,
        _: bytes,
        texts: Sequence[str],
        special: bool,
        longest: int,
        param: str,
        kept: int | None = None,
        side: str | None = None,
        before: Sequence[str] = (),
        usual: str = "left",
    ) -> tuple[Any, bytes]:
        """How many tokens each text has, behind its own of `before` or the only one there, where
        there is any; the ids of all of them, and their types. At most `kept` of a text, with what
        belongs around it, where no `side` is given that the caller cuts: what the `usual` side has
        too much is left out."""
        ids, types, lengths = array("I"), array("I"), []
        firsts = [*before] * len(texts) if len(before) == 1 else before
        for text in zip(firsts, texts, strict=True) if before else texts:
            encoded = self._encoding(text, special, param, kept if side is None else None, usual)
            longest = max(longest, len(encoded.ids) if kept is not None else 0)
            lengths.append(_checked(len(encoded.ids), longest, param))
            ids.extend(encoded.ids)
            types.extend(encoded.type_ids)
        return lengths, ids.tobytes() + types.tobytes()

    def question(self, blob: bytes, longest: int) -> tuple[Any, bytes]:
        """Of a question and its context the tokens' ids and types, where each begins and ends in
        its text, and whether that is the context."""
        encoded = self._encoding(json.loads(blob), True, "context")
        length = _checked(len(encoded.ids), longest, "context")
        starts, ends = zip(*encoded.offsets, strict=True)
        inside = [int(part == 1) for part in encoded.sequence_ids]
        parts = (encoded.ids, encoded.type_ids, starts, ends, inside)
        return [length], b"".join(array("I", part).tobytes() for part in parts)

    def chat(
        self,
        blob: bytes,
        special: bool,
        longest: int,
        kept: int | None = None,
        side: str | None = None,
    ) -> tuple[Any, bytes]:
        """The same of a conversation, through the chat template."""
        text = self._template.render(*json.loads(blob))
        return self.encode(b"", [text], special, longest, "messages", kept, side)

    def tokenize(
        self, blob: bytes, special: bool | None, longest: int, strings: bool
    ) -> tuple[Any, bytes]:
        """The answer of `/tokenize` to a text or to messages."""
        given, *how = json.loads(blob)
        text = given if isinstance(given, str) else self._template.render(given, *how)
        special = isinstance(given, str) if special is None else special
        encoded = self._encoding(text, special, "prompt")
        told = answers.Tokens(
            count=len(encoded.ids),
            max_model_len=longest,
            tokens=encoded.ids,
            token_strs=encoded.tokens if strings else None,
        )
        return None, told.model_dump_json().encode()

    def detokenize(self, blob: bytes) -> tuple[Any, bytes]:
        """The answer of `/detokenize`."""
        text = self._tokenizer.decode(json.loads(blob), skip_special_tokens=False)
        return None, answers.Text(prompt=text).model_dump_json().encode()

    def _encoding(
        self,
        text: str | Sequence[str],
        special: bool,
        param: str,
        kept: int | None = None,
        side: str = "left",
    ) -> Any:
        parts = (text,) if isinstance(text, str) else tuple(text)
        if (length := sum(map(len, parts))) > LONGEST:
            raise ApiError(
                f"The text is too long: it has {length} characters, at most {LONGEST} are read.",
                param=param,
                code="context_length_exceeded",
            )
        if kept is None:
            return self._tokenizer.encode(*parts, add_special_tokens=special)
        self._tokenizer.enable_truncation(kept, direction=side)
        try:
            return self._tokenizer.encode(*parts, add_special_tokens=special)
        finally:
            self._tokenizer.no_truncation()


def _checked(length: int, longest: int, param: str) -> int:
    """`length`; raises `ApiError` where it is more than `longest` tokens."""
    if length > longest:
        raise ApiError(
            f"The text is too long: it has {length} tokens, and this model's maximum context "
            f"length is {longest}.",
            param=param,
            code="context_length_exceeded",
        )
    return length


def _bound() -> None:
    """Have the kernel end this process when a call takes too long."""
    used = sum(os.times()[:2])
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + SECONDS, most))


def _bound_memory() -> None:
    with contextlib.suppress(OSError):  # only Linux tells, and heeds it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _call(work: Work | None, name: str) -> Callable[..., tuple[Any, bytes]]:
    if name == "grammar":
        from .grammars import read

        return read
    found: Callable[..., tuple[Any, bytes]] = check if name == "check" else getattr(work, name)
    return found


def _answer(work: Work | None, asked: dict[str, Any], blob: bytes) -> bytes:
    try:
        name = asked.pop("call")
        told, more = _call(work, name)(blob, **asked)
        return write_frame({"answer": told}, more)
    except MemoryError:
        refusal = ApiError(f"this takes more than {MEMORY >> 20} MB", code="too_expensive")
    except DoraExportError as error:
        refusal = as_api_error(error)
    except ApiError as error:
        refusal = error
    except BaseException as error:  # a panic of Rust is no Exception
        refusal = ApiError(f"the tokenizer: {error}")
    return write_frame(
        {"error": [str(refusal)[:1000], refusal.status, refusal.param, refusal.code]}
    )


def serve(source: BinaryIO, target: BinaryIO, *model: str) -> None:
    """Answer what `source` asks until it ends. `model`: as `Work` takes it, or nothing."""
    work = Work(*map(Path, model)) if model else None
    read = None if work is None else work.ready()
    _bound_memory()
    target.write(write_frame(read))
    target.flush()
    while head := source.read(_SIZES.size):
        told, blob = sizes(head)
        asked, more = json.loads(source.read(told)), source.read(blob)
        _bound()
        target.write(_answer(work, asked, more))
        target.flush()


if __name__ == "__main__":
    # Whoever ends the server's process group lets the server end this one, once it has finished.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers_to, *sys.argv[1:])
