"""The few endpoints of the Hugging Face hub that its file system asks, for one repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "someone/run"


class HubServer(ThreadingHTTPServer):
    """`files` is what the repository holds. `token`: who reads must have it, where there is one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.token: str | None = None
        self.commits: list[list[str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def entries(self, below: str) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path, data in self.files.items():
            if not below or path.startswith(f"{below}/"):
                parts = path.split("/")
                for depth in range(below.count("/") + bool(below) + 1, len(parts)):
                    folder = "/".join(parts[:depth])
                    found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0"}
                found[path] = self.entry(path, data)
        return list(found.values())

    @staticmethod
    def entry(path: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return {"type": "file", "path": path, "size": len(data), "oid": oid}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        done = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            else:
                continue
            done.append(f"{line['key']} {value['path']}")
        self.commits.append(done)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True

    def log_message(self, *_words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path).lstrip("/")
        model, file = f"api/models/{REPOSITORY}", f"{REPOSITORY}/resolve/main/"
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._missing("RepoNotFound", 401)
        elif path in (model, f"{model}/revision/main"):
            self._json({"id": REPOSITORY, "sha": "0" * 40, "siblings": []})
        elif path.startswith(f"{model}/tree/main"):
            entries = hub.entries(path.removeprefix(f"{model}/tree/main").strip("/"))
            self._json(entries) if entries else self._missing("EntryNotFound")
        elif path.startswith(file) and path.removeprefix(file) in hub.files:
            self._send(200, hub.files[path.removeprefix(file)])
        elif path.startswith((model, file)):
            self._missing("EntryNotFound")
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path).lstrip("/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        model = f"api/models/{REPOSITORY}"
        if path == f"{model}/preupload/main":
            names = [each["path"] for each in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": name, **plain} for name in names]})
        elif path == f"{model}/commit/main":
            hub.commit([json.loads(line) for line in body.splitlines()])
            self._json(
                {
                    "commitOid": "0" * 40,
                    "commitUrl": f"{hub.url}/{REPOSITORY}/commit/0",
                    "success": True,
                }
            )
        elif path == f"{model}/paths-info/main":
            asked = parse_qs(body.decode())["paths"]
            self._json([hub.entry(name, hub.files[name]) for name in asked if name in hub.files])
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._missing("RepoNotFound")

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def _missing(self, code: str, status: int = 404) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
        tag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        headers = {"Content-Length": str(len(body)), "ETag": f'"{tag}"', "X-Repo-Commit": "0" * 40}
        self.send_response(status)
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
