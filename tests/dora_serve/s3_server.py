"""A real S3 server (moto over HTTP) whose front can deny or hold single requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class S3Server:
    """`requests`: (method, path) of all that came. `denied`: those that get 403. `held`: those
    that wait for `release`; `holding` is set when one does."""

    def __init__(self) -> None:
        self.reset()
        self._clients: dict[str, Any] = {}
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"

    def reset(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.denied: Callable[[str, str], bool] = lambda _method, _path: False
        self.held: Callable[[str, str], bool] = lambda _method, _path: False
        self.holding, self.release = threading.Event(), threading.Event()

    @contextmanager
    def running(self) -> Iterator[S3Server]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.release.set()
            self._server.shutdown()
            thread.join()

    def client(self, service: str = "s3") -> Any:
        if service not in self._clients:
            self._clients[service] = boto3.client(
                service,
                endpoint_url=self.url,
                region_name="us-east-1",
                aws_access_key_id="setup",
                aws_secret_access_key="setup",
            )
        return self._clients[service]

    @property
    def store(self) -> Any:
        """What the server keeps, to set up and to look at without requests."""
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def empty(self) -> None:
        self.store.reset()

    def check_credentials(self, on: bool) -> None:
        """From now on who is not known, or not allowed to, is refused; or everyone is let in."""
        body = b"0" if on else b"inf"
        plain = {"Content-Type": "text/plain"}
        urlopen(Request(f"{self.url}/moto-api/reset-auth", body, plain, method="POST")).close()

    def keys(self, bucket: str) -> list[str]:
        return sorted(self.store.buckets[bucket].keys)

    def read(self, bucket: str, key: str) -> bytes:
        body: bytes = self.store.buckets[bucket].keys[key].value
        return body

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        denied, release = self.denied(method, path), self.release
        if self.held(method, path):
            self.holding.set()
            release.wait(60)
        if denied:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [DENIED]
        answer: Iterable[bytes] = self._moto(environ, start)
        return answer
