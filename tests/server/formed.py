"""Forms, and what else the newer routes take: more rows of `test_attacks.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.server.attacks import MANY, Attack, Send, complete, head, post, raw
from tests.server.followed import chats
from tests.server.test_structure import MODEL

ADAPTER = ".later/adapter"  # below the served folder
_KIND = "multipart/form-data; boundary=x"
_PART = b'--x\r\nContent-Disposition: form-data; name="file"'


def forms(body: Callable[[], bytes], kind: str = _KIND) -> Attack:
    """A form, sent to a server that hears nothing: it is read before that is known."""

    def ready() -> Send:
        sent = body()
        assert len(sent) <= MANY
        start = head(
            "/v1/audio/transcriptions", f"Content-Length: {len(sent)}", "Connection: close"
        )
        return raw(start.replace(b"application/json", kind.encode()) + sent)()

    return Attack(ready, frozenset({400}))


def beams(**more: object) -> Attack:
    asked = {"model": MODEL, "prompt": "say", "use_beam_search": True, "n": 128}
    return complete(lambda: {**asked, **more}, 200)


def _called(arguments: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"function": function}]}


FORMED: dict[str, Attack] = {
    "headers of a part": forms(lambda: _PART + b"\r\na: b" * 690_000 + b"\r\n\r\n\r\n--x--"),
    "parameters of a part": forms(lambda: _PART + b";" * 4_000_000 + b"\r\n\r\n\r\n--x--"),
    "quotes of a part": forms(lambda: _PART + b';"' * 2_000_000 + b"\r\n\r\n\r\n--x--"),
    "parameters in parts of a part": forms(
        lambda: _PART + b"".join(b"; a*%d*=b" % i for i in range(300_000)) + b"\r\n\r\n\r\n--x--"
    ),
    "parts": forms(lambda: (_PART + b"\r\n\r\n\r\n") * 70_000 + b"--x--"),
    "quotes in every part": forms(
        lambda: (_PART + b'; "' + b";" * 3900 + b"\r\n\r\n\r\n") * 63 + b"--x--",
        _KIND + ';"' + ";" * 14_000,
    ),
    "a part without end": forms(lambda: _PART + b"\r\n\r\n" + b"--" * 2_000_000),
    "parameters of a form": forms(
        lambda: _PART + b"\r\n\r\n\r\n--x--", _KIND.replace("; ", ";" * 15_000)
    ),
    "parameters of two kinds": forms(
        lambda: _PART + b"; name*0=a; name*=utf-8''b\r\n\r\n\r\n--x--"
    ),
    "an adapter of PEFT to convert": post(
        "/v1/load_lora_adapter", lambda: {"lora_name": "adapter", "lora_path": ADAPTER}, 200
    ),
    "the widest beams": beams(max_tokens=40),
    "log-probabilities told twice": complete(
        lambda: {
            "prompt": ["say the cat " * 6] * 128,
            "model": MODEL,
            "logprobs": 20,
            "echo": True,
        },
        200,
    ),
    "beams of what is told": beams(max_tokens=20, logprobs=20, ignore_eos=True),
    "arguments of a call": chats(
        *(200, 400), messages=[_called("[" + ("[" * 90 + "]" * 90 + ",") * 22_000 + "1]")]
    ),
    "objects as arguments": chats(*(200, 400), messages=[_called("[" + "{}," * 1_300_000 + "1]")]),
    "a million tokens to pool": post(
        "/pooling", lambda: {"model": MODEL, "input": [5] * 1_000_000}
    ),
}
