"""vLLM servers made equal to what is desired of a folder, over their own endpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from threading import get_ident
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from converters.errors import OutputError
from converters.files.handles import real

from .desired import Desired

_PASSING = (429, 502, 503, 504)  # what a proxy says, or a server that is busy
_TIMEOUT = 120.0  # loading an adapter waits for the step that the server is in
_REFUSAL = "refused.json"
_OTHER = "dora-serve"  # whose models are those of `up` with ONNX Runtime
_RENAME = "rename the run's folder"


@dataclass(frozen=True)
class Change:
    """What was done to one adapter of a server: "loaded", "reloaded", "unloaded", "refused" or
    "failed"."""

    server: str
    name: str
    done: str
    error: str = ""


class Server:
    """A vLLM server started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`.

    `refused`: name → the reason that it was told. `failed`: name → the folder that it does not
    load. `bases`: what it calls its base. `ours`: the names that were loaded from here. All are of
    its present start.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.refused: dict[str, str] = {}
        self.failed: dict[str, Path] = {}
        self.bases: set[str] = set()
        self.ours: set[str] = set()
        self._had: set[str] = set()
        self._has_plugin: bool | None = None
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def adapters(self) -> dict[str, Path]:
        """Name → folder of the adapters that are loaded. Raises `OSError` when it is not there."""
        try:
            with _answering(), urlopen(self._request("/v1/models"), timeout=_TIMEOUT) as answer:
                cards = json.load(answer)["data"]
                if any(card.get("owned_by") == _OTHER for card in cards):
                    # It takes runs of its own folder alone, and would lose what is unloaded here.
                    raise OSError("it is no vLLM, but serves its own folder with ONNX Runtime")
                found = {card["id"]: Path(card["root"]) for card in cards if card.get("parent")}
                self.bases = {card["id"] for card in cards if not card.get("parent")}
        except OSError:
            self._forget()
            raise
        if not self._had <= found.keys():
            self._forget()  # it was started anew
        self._had = set(found)
        return found

    def load(self, name: str, path: Path) -> None:
        self._post("load", name, lora_path=str(path))

    def switch(self, name: str, path: Path, folder: Path, back: Path | None = None) -> None:
        """Serve `name`, which is loaded, from `path`. A server without our plugin does not know the
        name for a moment: its own reload in place would mix old and new weights. `back`: what it
        is given again where it does not take `path`."""
        if self._knows_refusals(folder):
            self._post("load", name, lora_path=str(path), load_inplace=True)
            return
        self.unload(name)
        try:
            self.load(name, path)
        except HTTPError:
            if back is not None:
                with suppress(HTTPError):
                    self.load(name, back)
            raise

    def refuse(self, name: str, reason: str, folder: Path) -> None:
        """Have requests for `name` answered with the reason; without our plugin, as unknown."""
        if self._knows_refusals(folder):
            self._post("load", name, lora_path=str(_write_refusal(folder, reason)))
        elif name in self._had:
            self.unload(name)
        self._had.discard(name)

    def unload(self, name: str) -> None:
        self._post("unload", name)
        self._had.discard(name)

    def _knows_refusals(self, folder: Path) -> bool:
        """Whether the server has our plugin, which takes a refusal for an adapter."""
        if self._has_plugin is None:
            probe = _write_refusal(folder, "no run has this name")
            try:
                self._post("load", "dora-serve probe", lora_path=str(probe))
                self._post("unload", "dora-serve probe")
                self._has_plugin = True
            except HTTPError:
                self._has_plugin = False
        return self._has_plugin

    def _forget(self) -> None:
        self.refused, self.failed, self.ours = {}, {}, set()
        self._had, self._has_plugin = set(), None

    def _post(self, verb: str, name: str, **more: object) -> None:
        body = {"lora_name": name, **more}
        with _answering():
            urlopen(self._request(f"/v1/{verb}_lora_adapter", body), timeout=_TIMEOUT).close()

    def _request(self, path: str, body: Mapping[str, object] | None = None) -> Request:
        data = None if body is None else json.dumps(body).encode()
        return Request(self.url + path, data=data, headers=self._headers)


@contextmanager
def _answering() -> Iterator[None]:
    """What is no answer of a vLLM, such as one that ends in the middle or a proxy's own, as
    `OSError`."""
    try:
        yield
    except HTTPError as error:
        if error.code in _PASSING:
            raise OSError(f"{error.code} {error.reason}") from error
        raise
    except (HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"no answer of a vLLM: {type(error).__name__}: {error}") from error


def reconcile(
    server: Server, wanted: Desired, ours: Path, *, keep: bool = False
) -> Iterator[Change]:
    """Make the adapters of `server` equal to `wanted`, which it loads by links in the folder
    `ours`; what is loaded from there and not wanted is unloaded. Adapters that others loaded are
    left alone. `keep`: where the server does not take what a run became, the old one goes on.

    Raises `OSError` when the server does not answer, `OutputError` when the cache takes no link.
    """
    loaded = server.adapters()
    for name, adapter in wanted.adapters.items():
        path = _link(ours, adapter)
        if loaded.get(name) == path or server.failed.get(name) == path:
            continue
        if name in server.bases:  # vLLM would answer requests for the base with it
            server.failed[name] = path
            yield Change(server.url, name, "failed", f"its base is called so: {_RENAME}")
            continue
        there = loaded.get(name)
        if name in server.ours and there is not None and there.parent != ours:
            # Who else keeps the name would take it back: two runs would answer by turns.
            if real(there) != real(adapter):
                yield Change(server.url, name, "failed", f"another has taken the name: {_RENAME}")
            continue
        if there is None:
            change = _try(server, name, "loaded", partial(server.load, name, path))
        else:
            switch = partial(server.switch, name, path, ours, there if keep else None)
            change = _try(server, name, "reloaded", switch)
        if change.done == "failed":
            server.failed[name] = path
            if there is None or not keep:
                _refuse(server, name, change.error, ours)
        else:
            server.ours.add(name)
            server.failed.pop(name, None)
            server.refused.pop(name, None)
        yield change
    for name, reason in wanted.problems.items():
        known = name in wanted.adapters or name in server.bases
        if not known and server.refused.get(name) != reason:
            change = _refuse(server, name, reason, ours)
            if name in loaded:
                yield change
    theirs = {name for name, path in loaded.items() if path.parent != ours}
    gone = loaded.keys() - theirs | server.refused.keys()
    for name in gone - wanted.adapters.keys() - wanted.problems.keys() - set(wanted.moving):
        if name in theirs:  # refused from here once, and loaded by somebody since
            del server.refused[name]
            continue
        change = _try(server, name, "unloaded", partial(server.unload, name))
        if server.refused.pop(name, None) is None:
            yield change


def refusal_at(path: str) -> str | None:
    """The reason that lies in the folder `path` in the place of an adapter."""
    try:
        reason = json.loads((Path(path) / _REFUSAL).read_bytes())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(reason)


def _write_refusal(ours: Path, reason: str) -> Path:
    folder = ours / "refused" / sha256(reason.encode()).hexdigest()[:16]
    with _writing(folder):
        if refusal_at(str(folder)) != reason:  # a server may be reading what another was told
            folder.mkdir(parents=True, exist_ok=True)
            new = folder / f"{_own()}.json"
            new.write_text(json.dumps({"reason": reason}), encoding="utf-8")
            new.replace(folder / _REFUSAL)
    return folder


def _link(ours: Path, adapter: Path) -> Path:
    link = ours / adapter.name
    with _writing(link):
        if not link.is_symlink() or link.readlink() != adapter:  # as where the cache was moved
            ours.mkdir(parents=True, exist_ok=True)
            new = link.with_name(f"{link.name}.{_own()}")
            new.unlink(missing_ok=True)
            new.symlink_to(adapter)
            new.replace(link)
    return link


def _own() -> str:
    """What nobody else who writes into the cache is called."""
    return f"{os.getpid()}-{get_ident()}"


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """What keeps `place` in the cache from being written, told apart from what a server does."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the cache cannot be written: {error.strerror}",
            file=place,
            remedy="look after the disk: it is tried again",
        ) from None


def _refuse(server: Server, name: str, reason: str, ours: Path) -> Change:
    server.refused[name] = reason
    return _try(server, name, "refused", partial(server.refuse, name, reason, ours))


def _try(server: Server, name: str, done: str, action: Callable[[], Any]) -> Change:
    try:
        action()
    except HTTPError as error:  # the server is there, and refuses
        return Change(server.url, name, "failed", _message(error))
    return Change(server.url, name, done)


def _message(error: HTTPError) -> str:
    try:
        text = error.read().decode(errors="replace")
    except (HTTPException, OSError):  # it ended in the middle
        return str(error)
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500] or str(error)
