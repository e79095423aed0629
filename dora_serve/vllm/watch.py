"""Desired state: the adapters of running vLLM servers follow a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from converters.errors import DoraExportError, RunError
from converters.files.cache import cache_folder

from ..folder.inventory import discover
from .convert import vllm_adapter

_TIMEOUT = 120.0  # loading an adapter waits for the step that the server is in


@dataclass(frozen=True)
class Change:
    """What was done to one adapter of a server: "loaded", "reloaded", "unloaded" or "failed"."""

    server: str
    name: str
    done: str
    error: str = ""


@dataclass(frozen=True)
class Desired:
    """Name → adapter folder of everything in a folder; what cannot be an adapter, with the reason;
    and what to know of the rest."""

    adapters: Mapping[str, Path]
    problems: Mapping[str, str]
    warnings: Mapping[str, str]


def desired(root: Path, base: str | None) -> Desired:
    """What servers should have of `root`, converted where it was not, in links in `links(root)`.

    Raises `RunError` when the runs are of several bases.
    """
    found = discover(root, base)
    bases = {found.name_of(member.base) for member in found.members.values()}
    if len(bases) > 1:
        raise RunError(
            "one server has one base",
            file=root,
            found=", ".join(sorted(bases)),
            remedy="choose with --base",
        )
    adapters, problems = {}, dict(found.problems)
    for name, member in found.members.items():
        try:
            adapters[name] = _link(links(root), vllm_adapter(member))
        except DoraExportError as error:
            problems[name] = str(error)
    return Desired(adapters, problems, found.warnings)


def links(root: Path) -> Path:
    """Where the adapters of `root` are linked to: what a server loaded from there is ours to
    unload, also after a restart, and nothing else is."""
    return cache_folder().resolve() / "watched" / sha256(bytes(root.resolve())).hexdigest()[:16]


def _link(folder: Path, adapter: Path) -> Path:
    link = folder / adapter.name
    if not link.is_symlink():
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(adapter)
    return link


class Server:
    """A vLLM server started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def adapters(self) -> dict[str, Path]:
        """Name → folder of the adapters that are loaded. Raises `OSError` when it is not there."""
        with urlopen(self._request("/v1/models"), timeout=_TIMEOUT) as answer:
            cards = json.load(answer)["data"]
        return {card["id"]: Path(card["root"]) for card in cards if card.get("parent")}

    def load(self, name: str, path: Path, *, inplace: bool = False) -> None:
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": inplace}
        urlopen(self._request("/v1/load_lora_adapter", body), timeout=_TIMEOUT).close()

    def unload(self, name: str) -> None:
        body = {"lora_name": name}
        urlopen(self._request("/v1/unload_lora_adapter", body), timeout=_TIMEOUT).close()

    def _request(self, path: str, body: Mapping[str, object] | None = None) -> Request:
        data = None if body is None else json.dumps(body).encode()
        return Request(self.url + path, data=data, headers=self._headers)


def reconcile(
    server: Server, wanted: Mapping[str, Path], ours: Path, kept: Container[str] = ()
) -> Iterator[Change]:
    """Make the adapters of `server` equal to `wanted`. What is loaded from the folder `ours` and
    neither wanted nor `kept` is unloaded; others are left alone.

    Raises `OSError` when the server does not answer.
    """
    loaded = server.adapters()
    for name, path in wanted.items():
        if name not in loaded:
            yield _try(server, name, "loaded", partial(server.load, name, path))
        elif loaded[name] != path:
            load = partial(server.load, name, path, inplace=True)
            yield _try(server, name, "reloaded", load)
    for name, path in loaded.items():
        if name not in wanted and name not in kept and path.parent == ours:
            yield _try(server, name, "unloaded", partial(server.unload, name))


def _try(server: Server, name: str, done: str, action: Callable[[], Any]) -> Change:
    try:
        action()
    except HTTPError as error:  # the server is there, and refuses
        return Change(server.url, name, "failed", error.read().decode(errors="replace")[:500])
    return Change(server.url, name, done)
