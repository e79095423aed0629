"""What is followed of a folder as it is now, and servers of a few lines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from converters.model.base import open_base
from dora_serve.vllm.desired import Desired, Following


def desired(root: Path, base: str | Path | None = None) -> Desired:
    return Following(root, given=None if base is None else open_base(base)).at_rest()


def find_run(root: Path, name: str) -> Path | None:
    """The folder of the run that a request for `name` means; None where there is none."""
    following = Following(root)
    return following._paths[name] if following.find(name) else None


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server that answers by `handler`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{web.server_port}"
        finally:
            web.shutdown()
            thread.join()
