"""Kubernetes manifests: a Deployment and a Service for each server, on one claim of storage."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..vllm.command import command_line, serve_options
from ..vllm.fleet import Pool
from ..vllm.plugin import live_environment
from . import PORT, Cluster

Manifest = dict[str, Any]

_CLAIM, _SECRET = "dora-serve-models", "dora-serve"
_CACHE, _SHARED = "/cache", "/dev/shm"
TAKEN = ("/", _CACHE, _SHARED)  # the folder cannot be there
_LENGTH = 52  # of a name; a Deployment's pods add eleven to it, and 63 are allowed
_QUIET = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}  # everything is in the folder
_WAITING = "vllm_num_requests_waiting"


def vllm_servers(
    cluster: Cluster, pools: Sequence[tuple[str, Pool]], image: str
) -> Iterator[Manifest]:
    """A vLLM for each pool with the plan's command line. It converts runs when requests name them:
    `image` has vLLM and this package."""
    yield _claim(cluster)
    labels = _names([name for name, _ in pools])
    for name, pool in pools:
        options = serve_options(pool, dict.fromkeys(pool.ranks, pool.base.path))
        options.pop("lora-modules", None)
        options["model"] = cluster.there(pool.base.path)
        environment = dict(_QUIET)
        if pool.ranks:
            environment |= live_environment(pool, str(cluster.at))
        more = ["--host", "0.0.0.0", "--port", str(PORT)]
        words = command_line(options, more=more)
        container = _container(cluster, image, words[:2], words[2:], environment)
        container["env"].append(_key("VLLM_API_KEY"))
        container["resources"] = {"limits": {"nvidia.com/gpu": 1}}
        container["volumeMounts"].append({"name": "shm", "mountPath": _SHARED})
        shm = {"name": "shm", "emptyDir": {"medium": "Memory"}}
        metric = {
            "type": "Pods",
            "pods": {
                "metric": {"name": _WAITING},
                "target": {"type": "AverageValue", "averageValue": "4"},
            },
        }
        yield from _server(cluster, labels[name], container, [shm], metric)


def embedded_server(
    cluster: Cluster, base: str | None, threads: int, image: str
) -> Iterator[Manifest]:
    """The embedded server of everything in the folder. `threads`: cores of a replica."""
    yield _claim(cluster)
    words = [str(cluster.at), "--host", "0.0.0.0", "--port", str(PORT), "--threads", str(threads)]
    if base is not None:
        words += ["--base", base]
    container = _container(cluster, image, ["dora-serve", "up"], words, {})
    container["env"].append(_key("DORA_SERVE_API_KEY"))
    container["readinessProbe"] = _probe("/ready", 5, 2)
    container["resources"] = {"requests": {"cpu": str(threads)}}
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}},
    }
    yield from _server(cluster, "dora-serve", container, [], metric)


def _claim(cluster: Cluster) -> Manifest:
    """Storage for the folder, with a tenth of room."""
    size = 0
    for folder, _, files in os.walk(cluster.root):
        for file in files:
            with contextlib.suppress(OSError):  # gone since it was listed, or a link to nothing
                size += Path(folder, file).stat().st_size
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": _CLAIM, "labels": _labels()},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": f"{math.ceil(1.1 * size / (1 << 30))}Gi"}},
        },
    }


def _server(
    cluster: Cluster,
    name: str,
    container: Manifest,
    volumes: Sequence[Manifest],
    metric: Manifest,
) -> Iterator[Manifest]:
    selector = {"app.kubernetes.io/name": "dora-serve", "app.kubernetes.io/instance": name}
    spec: Manifest = {
        "selector": {"matchLabels": selector},
        "template": {
            "metadata": {"labels": selector},
            "spec": {
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,  # their VLLM_… variables would be taken for options
                "terminationGracePeriodSeconds": 120,
                "containers": [container],
                "volumes": [
                    {
                        "name": "models",
                        "persistentVolumeClaim": {"claimName": _CLAIM, "readOnly": True},
                    },
                    {"name": "cache", "emptyDir": {}},
                    *volumes,
                ],
            },
        },
    }
    grows = cluster.most > cluster.least
    if not grows:  # else the autoscaler's number would be undone whenever this is applied
        spec["replicas"] = cluster.least
    meta = {"name": name, "labels": _labels(name)}
    yield {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec}
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    service = {"selector": selector, "ports": ports}
    yield {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service}
    if grows:
        yield {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": meta,
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
                "minReplicas": cluster.least,
                "maxReplicas": cluster.most,
                "metrics": [metric],
            },
        }


def _container(
    cluster: Cluster,
    image: str,
    command: Sequence[str],
    words: Sequence[str],
    environment: Mapping[str, str],
) -> Manifest:
    known = {"DORA_SERVE_CACHE": _CACHE, **environment}
    return {
        "name": "server",
        "image": image,
        "command": list(command),
        "args": [_literal(word) for word in words],
        "env": [{"name": name, "value": _literal(value)} for name, value in known.items()],
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": _probe("/health", 10, 180),
        "readinessProbe": _probe("/health", 5, 2),
        "livenessProbe": _probe("/health", 10, 6),
        # Time for the Service to send no more here, before the server is told to end.
        "lifecycle": {"preStop": {"sleep": {"seconds": 5}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "models", "mountPath": str(cluster.at), "readOnly": True},
            {"name": "cache", "mountPath": _CACHE},
        ],
    }


def _probe(path: str, period: int, failures: int) -> Manifest:
    get = {"path": path, "port": "http"}
    return {
        "httpGet": get,
        "periodSeconds": period,
        "timeoutSeconds": 5,  # one is too little for a server under load
        "failureThreshold": failures,
    }


def _literal(text: str) -> str:
    """Text in which Kubernetes puts no variable's value in the place of `$(NAME)`."""
    return text.replace("$", "$$")


def _key(variable: str) -> Manifest:
    """The key that clients must send, from a Secret; where that is not made, none."""
    source = {"name": _SECRET, "key": "api-key", "optional": True}
    return {"name": variable, "valueFrom": {"secretKeyRef": source}}


def _labels(name: str | None = None) -> dict[str, str]:
    own = {} if name is None else {"app.kubernetes.io/instance": name}
    return {"app.kubernetes.io/name": "dora-serve", **own}


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
