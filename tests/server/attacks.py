"""What a client may send to do harm, each with the statuses it may get: the rows of
`test_attacks.py`. A row is what is sent on one connection, or on many."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import repeat

from tests.server.conftest import BASE, EMBEDS, SENTIMENT

MANY = 4 << 20  # bytes, the bound of a body
TEMPLATES = {  # by the text of a message
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "repeats": "{{ ('a' * 10 ** 9) | length }}",
    "pads": "{{ '%900000000d' % 1 }}",
    "centers": "{{ 'a' | center(900000000) }}",
    "joins": "{{ range(99999) | map('string') | join('x' * 20000) }}",
    "grows": "{% set n = namespace(t='a') %}{% for a in range(60) %}{% set n.t = n.t + n.t %}"
    "{% endfor %}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "ranges": "{{ range(10 ** 9) | list }}",
    "powers": "{{ (m.content | length) ** (9 ** 9) }}",
    "divides": "{{ 1 / 0 }}",
    "surrogates": "{{ '\\ud800' }}",
    "escapes": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "includes": "{% include '/etc/passwd' %}",
    "writes long": "{{ 'one ' * 10 ** 6 }}",
}
TEMPLATE = (
    "{% for m in messages %}"
    + "".join(
        f"{{% {'el' if i else ''}if m.content == {name!r} %}}{text}"
        for i, (name, text) in enumerate(TEMPLATES.items())
    )
    + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
_PART = {"type": "output_text", "text": "", "annotations": [[]] * 300}
HANDED_BACK = {"role": "assistant", "content": [_PART]}
LATER = ".later/run"  # below the served folder
PATTERN = "(x+x+)+y"  # takes forever with many x


Send = Callable[[tuple[str, int]], Iterable[int]]


@dataclass(frozen=True)
class Attack:
    """`ready`: makes what `send`s to a server, which tells the statuses that were answered, 0 for
    none. `fine`: those that it may."""

    ready: Callable[[], Send]
    fine: frozenset[int]


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def read(bare: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    answer = b""
    with suppress(ConnectionError):
        while piece := bare.recv(1 << 20):
            answer += piece[: 1 << 16]
    return answer


def raw(*pieces: bytes, pause: float = 0) -> Callable[[], Send]:
    """Sends these and reads what comes."""

    def send(address: tuple[str, int]) -> Iterable[int]:
        with socket.create_connection(address, timeout=120) as bare:
            with suppress(ConnectionError):
                for piece in pieces:
                    bare.sendall(piece)
                    time.sleep(pause)
            return [status(read(bare))]

    return lambda: send


def head(path: str, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, "\r\n"]).encode()


def post(path: str, body: Callable[[], object], *fine: int) -> Attack:
    """A whole request. `body`: what makes its bytes, or what JSON writes."""

    def ready() -> Send:
        made = body()
        sent = made if isinstance(made, bytes) else json.dumps(made).encode()
        assert len(sent) <= MANY
        start = head(path, f"Content-Length: {len(sent)}", "Connection: close")
        return raw(start + sent)()

    return Attack(ready, frozenset(fine or {400}))


def complete(more: Callable[[], dict[str, object]], *fine: int) -> Attack:
    return post("/v1/completions", lambda: {"model": BASE, "max_tokens": 1, **more()}, *fine)


def chat(text: str) -> Attack:
    messages = [{"role": "user", "content": text}]
    return post(
        "/v1/chat/completions", lambda: {"model": BASE, "messages": messages, "max_tokens": 1}
    )


def text(content: bytes) -> bytes:
    """A completion's body whose prompt is this, as it is."""
    return b'{"model": "%s", "prompt": %s}' % (BASE.encode(), content)


def chunked(piece: bytes, count: int) -> Attack:
    start = head("/v1/completions", "Transfer-Encoding: chunked")
    chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
    group = max(1, (64 << 10) // len(chunk))
    return Attack(raw(start, *repeat(chunk * group, count // group)), frozenset({0, 400, 408, 413}))


def _idle(address: tuple[str, int]) -> Iterator[int]:
    with ExitStack() as held:
        for _ in range(1500):
            bare = held.enter_context(socket.create_connection(address, timeout=60))
            bare.sendall(b"GET /health HTTP/1.1\r\n")
        time.sleep(3)
        yield 0


def _never_read(address: tuple[str, int]) -> Iterator[int]:
    body = json.dumps({"model": BASE, "tokens": [5] * 200_000}).encode()
    with ExitStack() as held:
        for _ in range(20):
            bare = held.enter_context(socket.socket())
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            bare.connect(address)
            bare.sendall(head("/detokenize", f"Content-Length: {len(body)}") + body)
        time.sleep(15)
        yield 0


_SHORT = frozenset({0, 400})
_GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"

ATTACKS: dict[str, Attack] = {
    "tokens that are none": complete(lambda: {"prompt": [-1] * 1_000_000}),
    "unknown names": complete(lambda: {f"{i:x}": 1 for i in range(350_000)}),
    "messages that are none": post(
        "/v1/chat/completions", lambda: {"model": BASE, "messages": [{}] * 10**6}
    ),
    "stops that are none": complete(lambda: {"prompt": "one", "stop": [1] * 10**6}),
    "metadata that is none": post(
        "/v1/chat/completions",
        lambda: {
            "model": BASE,
            "messages": [{"role": "user", "content": "one"}],
            "metadata": {f"{i:x}": 1 for i in range(350_000)},
        },
    ),
    "biases": complete(
        lambda: {"prompt": "one", "logit_bias": {str(i): 1 for i in range(300_000)}}
    ),
    "allowed tokens that are none": complete(
        lambda: {"prompt": "one", "allowed_token_ids": [-1] * 1_000_000}
    ),
    "allowed tokens": complete(
        lambda: {"prompt": "one", "n": 64, "allowed_token_ids": [5] * 262_144}, 200
    ),
    "words that may not be": complete(lambda: {"prompt": "one", "bad_words": ["a"] * 800_000}),
    "a long word that may not be": complete(
        lambda: {"prompt": "one", "bad_words": ["one " * 249] * 64}
    ),
    "log-probabilities of prompts": complete(
        lambda: {"prompt": ["one " * 60] * 128, "prompt_logprobs": 20, "n": 2}
    ),
    "a schema": complete(
        lambda: {"prompt": "one", "structured_outputs": {"json": {"enum": ["a" * 1000] * 4000}}}
    ),
    "a schema of many names": complete(
        lambda: {
            "prompt": "one",
            "structured_outputs": {"json": {"properties": {f"{i:x}": {} for i in range(300_000)}}},
        }
    ),
    "a pattern of many states": complete(
        lambda: {"prompt": "one", "structured_outputs": {"regex": "((a{1,999}){1,999}){1,999}b"}}
    ),
    "a grammar": complete(
        lambda: {
            "prompt": "one",
            "structured_outputs": {"grammar": "\n".join(f"a{i}: a{i + 1}*" for i in range(5000))},
        }
    ),
    "many tools": post(
        "/v1/chat/completions",
        lambda: {
            "model": BASE,
            "messages": [{"role": "user", "content": "one"}],
            "tools": [{"type": "function", "function": {"name": "f"}}] * 60_000,
            "tool_choice": "required",
        },
    ),
    "values for a template": post(
        "/v1/chat/completions",
        lambda: {
            "model": BASE,
            "messages": [{"role": "user", "content": "one"}],
            "max_tokens": 1,
            "chat_template_kwargs": {f"{i:x}": [i] for i in range(200_000)},
        },
    ),
    "what a client adds to a message": post(
        "/v1/chat/completions",
        lambda: {
            "model": BASE,
            "messages": [
                {
                    "role": "user",
                    "content": "one",
                    "provider_specific_fields": {f"{i:x}": [i] for i in range(200_000)},
                }
            ],
            "max_tokens": 1,
        },
    ),
    "schemas of tools": post(
        "/v1/chat/completions",
        lambda: {
            "model": BASE,
            "messages": [{"role": "user", "content": "one"}],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": f"f{i}",
                        "parameters": {"properties": {f"{j:x}": {} for j in range(2000)}},
                    },
                }
                for i in range(100)
            ],
        },
    ),
    "texts to rank": post(
        "/rerank", lambda: {"model": EMBEDS, "query": "a", "documents": ["a"] * 800_000}
    ),
    "anything at all": post("/invocations", lambda: {f"{i:x}": 1 for i in range(350_000)}),
    "inputs that are none": post(
        "/v1/embeddings", lambda: {"model": EMBEDS, "input": [-1] * 1_000_000}
    ),
    "too many inputs": post("/classify", lambda: {"model": SENTIMENT, "input": ["a"] * 800_000}),
    "too many messages": post(
        "/v1/chat/completions",
        lambda: {"model": BASE, "messages": [{"role": "user", "content": ""}] * 10**5},
    ),
    "too many parts": post(
        "/v1/chat/completions",
        lambda: {
            "model": BASE,
            "messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10**5}],
        },
    ),
    "too many items": post("/v1/responses", lambda: {"model": BASE, "input": [{}] * 10**6}),
    "what is handed back": post(
        "/v1/responses",
        lambda: {"model": BASE, "max_output_tokens": 1, "input": [HANDED_BACK] * 2000},
        *(200, 400),
    ),
    "tokens to pool": post(
        "/pooling",
        lambda: {"model": EMBEDS, "input": ["good film " * 10] * 256, "task": "token_embed"},
        200,
    ),
    "too many tokens": complete(lambda: {"prompt": [5] * 1_300_000}),
    "too many tokens to decode": post(
        "/detokenize", lambda: {"model": BASE, "tokens": [5] * 1_300_000}
    ),
    "too many prompts of tokens": complete(lambda: {"prompt": [[]] * 1_000_000}),
    "lists in lists": post("/v1/completions", lambda: b"[" + b"[]," * ((MANY >> 2) - 1) + b"[]]"),
    "objects in lists": post(
        "/v1/completions", lambda: b"[" + b'{"a":[]},' * (MANY // 9 - 1) + b"{}]"
    ),
    "one name many times": post(
        "/v1/completions", lambda: b"{" + b'"a":1,' * (MANY // 6 - 1) + b'"a":1}'
    ),
    "depth": post("/v1/completions", lambda: b"[" * MANY),
    "depth of a prompt": post("/v1/completions", lambda: text(b"[" * 10**6 + b"]" * 10**6)),
    "digits": post("/v1/completions", lambda: text(b"[" + b"9" * 4_000_000 + b"]")),
    "a huge number": complete(lambda: {"prompt": "one", "max_tokens": 10**4000}),
    "a huge float": post(
        "/v1/completions", lambda: b'{"model": "x", "prompt": "a", "temperature": 1e999}'
    ),
    "not a number": post(
        "/v1/completions", lambda: b'{"model": "x", "prompt": "a", "temperature": NaN}'
    ),
    "no Unicode": post("/v1/completions", lambda: text(b'"\xff\xfe"')),
    "half a surrogate pair": post("/v1/completions", lambda: text(b'"\\ud800"')),
    "one long word": complete(lambda: {"prompt": "a" * 4_000_000}),
    "many words": complete(lambda: {"prompt": "one " * 1_000_000}),
    "many words within the bound": complete(lambda: {"prompt": "one " * 260_000}),
    "many unknown signs": complete(lambda: {"prompt": "\u20ac " * 500_000}),
    "words to tokenize": post(
        "/tokenize",
        lambda: {"model": BASE, "prompt": "a " * 500_000, "return_token_strs": True},
        200,
        400,
    ),
    "tokens to decode": post("/detokenize", lambda: {"model": BASE, "tokens": [5] * 262_144}, 200),
    "a pattern without end": complete(lambda: {"prompt": "x" * 5_000}),
    "texts at once": post(
        "/v1/embeddings", lambda: {"model": EMBEDS, "input": ["good film " * 10] * 256}, 200
    ),
    "log-probabilities": complete(
        lambda: {
            "prompt": ["one"] * 2,
            "n": 128,
            "logprobs": 20,
            "max_tokens": 60,
            "ignore_eos": True,
        }
    ),
    "choices": post(
        "/v1/completions",
        lambda: {
            "model": BASE,
            "prompt": "one",
            "n": 128,
            "max_tokens": 20,
            "ignore_eos": True,
            "stop": ["a" * 1000] * 16,
        },
        200,
    ),
    "an adapter's name": post(
        "/v1/load_lora_adapter", lambda: {"lora_name": "a" * 10**6, "lora_path": "a"}, 413
    ),
    "an adapter to convert": post(
        "/v1/load_lora_adapter", lambda: {"lora_name": "later", "lora_path": LATER}, 200
    ),
    "a model as an adapter": post(
        "/v1/load_lora_adapter", lambda: {"lora_name": "none", "lora_path": EMBEDS}
    ),
    "a body of another type": Attack(
        raw(
            _GET[:-2].replace(b"GET /health", b"POST /v1/completions")
            + b"\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
        ),
        frozenset({400}),
    ),
    **{f"a template that {name}": chat(name) for name in TEMPLATES},
    "a head without end": Attack(raw(_GET, *repeat(b"x: " + b"y" * 10_000 + b"\r\n", 500)), _SHORT),
    "one long header": Attack(raw(_GET + b"x: " + b"y" * (8 << 20)), _SHORT),
    "headers without end": Attack(raw(_GET + b"x: y\r\n" * 10**6), _SHORT),
    "a slow head": Attack(raw(_GET, *repeat(b"x: y\r\n", 12), pause=2), _SHORT),
    "a body that does not come": Attack(
        raw(head("/v1/completions", "Content-Length: 1000"), b"{", pause=5), frozenset({408})
    ),
    "a longer body than told": Attack(
        raw(head("/v1/completions", "Content-Length: 2") + b"{}" + b"x" * MANY), _SHORT
    ),
    "a length of too many digits": Attack(
        raw(head("/v1/completions", "Content-Length: " + "9" * 5000)), frozenset({0, 400, 413})
    ),
    "two lengths": Attack(
        raw(
            head("/v1/completions", "Content-Length: 2", "Transfer-Encoding: chunked")
            + b"0\r\n\r\n"
        ),
        _SHORT,
    ),
    "a body in pieces without end": chunked(b"x" * 65_536, 2_000),
    "a body of single bytes": chunked(b"x", 300_000),
    "requests one behind another": Attack(
        raw((_GET + b"\r\n") * 3_000 + _GET + b"Connection: close\r\n\r\n"), frozenset({200})
    ),
    "no HTTP": Attack(
        raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 10**6), frozenset({0, 400, 404})
    ),
    "a change to WebSocket": Attack(
        raw(
            _GET
            + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        ),
        frozenset({200}),
    ),
    "idle connections": Attack(lambda: _idle, frozenset({0})),
    "clients that never read": Attack(lambda: _never_read, frozenset({0})),
}

# Whose bound is a time to wait.
_SLOW = "a slow head|a body that does not come|a body of single bytes|clients that never read"
SLOW = set(_SLOW.split("|"))
assert ATTACKS.keys() > SLOW
