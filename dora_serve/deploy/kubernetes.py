"""Kubernetes manifests: `manifests.yaml` filled in."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from ..vllm.command import command_line, serve_options
from ..vllm.fleet import Pool
from ..vllm.plugin import live_environment
from . import PORT, Cluster

TAKEN = ("/", "/cache", "/dev/shm")  # the folder cannot be there
_LENGTH = 52  # of a name; a Deployment's pods add eleven to it, and 63 are allowed
_LISTEN = ["--host", "0.0.0.0", "--port", str(PORT)]


def vllm_servers(cluster: Cluster, pools: Sequence[tuple[str, Pool]], image: str) -> str:
    """A vLLM for each pool with the plan's command line. It converts runs when requests name them:
    `image` has vLLM and this package."""
    servers = []
    labels = _names([name for name, _ in pools])
    for name, pool in pools:
        options = serve_options(pool, dict.fromkeys(pool.ranks, pool.base.path), gpu=True)
        options.pop("lora-modules", None)
        options["model"] = cluster.there(pool.base.path)
        words = command_line(options, more=_LISTEN)
        environment = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}  # everything is in the folder
        if pool.ranks:
            environment |= live_environment(pool, str(cluster.at))
        servers.append(_server(labels[name], words, environment))
    return _manifests(cluster, image, servers, engine="vllm")


def embedded_server(cluster: Cluster, base: str | None, threads: int, image: str) -> str:
    """The embedded server of everything in the folder. `threads`: cores of a replica."""
    words = ["dora-serve", "up", str(cluster.at), *_LISTEN, "--threads", str(threads)]
    words += ["--precision", "fp32"]  # the same on every node
    if base is not None:
        words += ["--base", base]
    server = _server("dora-serve", words, {})
    return _manifests(cluster, image, [server], engine="onnxruntime", threads=str(threads))


def _server(name: str, words: Sequence[str], environment: dict[str, str]) -> dict[str, object]:
    return {"name": name, "command": words[:2], "words": words[2:], "environment": environment}


def _manifests(
    cluster: Cluster, image: str, servers: Sequence[dict[str, object]], **more: str
) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"quoted": _quoted, "literal": _literal}
    template = environment.from_string(
        Path(__file__).with_name("manifests.yaml").read_text("utf-8")
    )
    return template.render(
        cluster=cluster,
        grows=cluster.most > cluster.least,  # then the number is the autoscaler's, not ours
        storage=_storage(cluster.root),
        image=image,
        port=PORT,
        servers=servers,
        **more,
    )


def _quoted(text: str | Sequence[str]) -> str:
    """Text, or a list of it, that no reader of YAML takes for a number or a truth value."""
    import yaml

    said: str = yaml.safe_dump(text, default_style='"', default_flow_style=True, width=math.inf)
    return said.strip()


def _literal(text: str) -> str:
    """Text in which Kubernetes puts no variable's value in the place of `$(NAME)`."""
    return _quoted(text.replace("$", "$$"))


def _storage(root: Path) -> int:
    """GiB for the folder, with a tenth of room."""
    size = 0
    for folder, _, files in os.walk(root):
        for file in files:
            with contextlib.suppress(OSError):  # gone since it was listed, or a link to nothing
                size += Path(folder, file).stat().st_size
    return math.ceil(1.1 * size / (1 << 30))


def _names(names: Sequence[str]) -> dict[str, str]:
    """Names as Kubernetes takes them; a digest tells those apart that would be the same, or cut."""
    plain = {name: re.sub(r"[^a-z0-9]+", "-", f"vllm {name}".lower()).strip("-") for name in names}
    count = Counter(plain.values())
    return {
        name: label
        if count[label] == 1 and len(label) <= _LENGTH
        else f"{label[: _LENGTH - 9].rstrip('-')}-{sha256(name.encode()).hexdigest()[:8]}"
        for name, label in plain.items()
    }
