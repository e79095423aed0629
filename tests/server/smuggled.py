"""Requests in the body of another: more rows of `test_attacks.py`."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from tests.server.attacks import Attack, Send, head, post, read

_SECOND = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def smuggles(*lines: str, body: bytes) -> Attack:
    """A request behind which another lies that only a reader of other lengths sees: 0 where more
    than one was answered."""

    def send(address: tuple[str, int]) -> Iterable[int]:
        with socket.create_connection(address, timeout=120) as bare:
            bare.sendall(head("/v1/completions", "Connection: close", *lines) + body + _SECOND)
            answers = read(bare).split(b"HTTP/1.1 ")[1:]
        return [int(answers[0][:3]) if len(answers) == 1 else 0]

    def ready() -> Send:
        return send

    return Attack(ready, frozenset({400}))


MORE: dict[str, Attack] = {
    "two kinds of length": smuggles(
        "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"
    ),
    "two kinds of length in what is refused": smuggles(
        "Origin: http://other.example",
        "Content-Length: 5",
        "Transfer-Encoding: chunked",
        body=b"0\r\n\r\n",
    ),
    "two codings": smuggles(
        "Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=b"0\r\n\r\n"
    ),
    "an unknown coding": smuggles("Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "two lengths that differ": smuggles("Content-Length: 2", "Content-Length: 40", body=b"{}"),
    "a length with a blank": smuggles("Content-Length : 2", body=b"{}"),
    "a length in hexadecimal": smuggles("Content-Length: 0x2", body=b"{}"),
    "a length below zero": smuggles("Content-Length: -1", body=b"{}"),
    "a line break in a header": smuggles("X: a\rContent-Length: 3", body=b"{}"),
    "a piece of a length without end": smuggles(
        "Transfer-Encoding: chunked", body=b"f" * 40 + b"\r\nx"
    ),
    "a name that would be a metric": post(
        "/v1/completions", lambda: {"model": 'a"}\nevil 1', "prompt": "one"}, 404
    ),
}  # fmt: skip
