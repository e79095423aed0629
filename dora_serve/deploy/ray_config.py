"""Ray Serve configurations, for `serve deploy FILE`.

Fields: ray-project/ray `python/ray/serve/schema.py` and, for vLLM, `ray.serve.llm.LLMConfig`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from converters.errors import TargetError

from ..onnxruntime.limits import Limits
from ..vllm.command import serve_options
from ..vllm.fleet import Pool
from . import PORT, Cluster

_ELSEWHERE = {"model", "served-model-name", "lora-modules"}  # what LLMConfig says in other words
_STORE = re.compile(r"(s3|gs|abfss|azure)://[^/]")
_REQUESTS = 64  # of a vLLM, as in KubeRay's examples; Ray's own value, 1e9, never adds a replica


def vllm_app(cluster: Cluster, pools: Sequence[tuple[str, Pool]], adapters: str | None) -> str:
    """An OpenAI-compatible application with a vLLM for each pool, named by what clients call its
    base. `adapters`: where Ray finds the adapters, each in a folder of its name.

    Raises `TargetError` when there are adapters and no such place, for names that Ray would take
    for others, or for a base that the servers do not see.
    """
    ids = Counter(adapter_id(member) for _, pool in pools for member in pool.ranks)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise TargetError(
            "two adapters would have the same name in Ray",
            found=", ".join(twice),
            remedy="rename a folder",
        )
    configs = [_llm_config(cluster, name, pool, adapters) for name, pool in pools]
    return _deploy("ray.serve.llm:build_openai_app", {"llm_configs": configs})


def embedded_app(cluster: Cluster, base: str | None, threads: int) -> str:
    """The embedded server, every replica with everything that the folder holds. `threads`: cores of
    a replica."""
    deployment = {
        "name": "Embedded",
        **cluster.scale(Limits().max_rows),
        "ray_actor_options": {"num_cpus": threads},
    }
    args = {"folder": str(cluster.at), "base": base, "threads": threads}
    return _deploy("dora_serve.deploy.ray_app:application", args, deployments=[deployment])


def adapter_id(name: str) -> str:
    """What Ray calls an adapter: a folder's name has no slash."""
    return name.replace("/", "--")


def _deploy(import_path: str, args: Mapping[str, object], **more: object) -> str:
    import yaml

    application = {"name": "dora-serve", "route_prefix": "/", "import_path": import_path}
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": [{**application, "args": args, **more}],
    }
    text: str = yaml.safe_dump(config, sort_keys=False)
    return text


def _llm_config(cluster: Cluster, name: str, pool: Pool, adapters: str | None) -> dict[str, object]:
    if ":" in name:
        raise TargetError(
            "Ray Serve LLM takes what follows a colon for an adapter",
            found=name,
            remedy="rename the base's folder",
        )
    options = serve_options(pool, dict.fromkeys(pool.ranks, pool.base.path), gpu=True)
    engine = {n.replace("-", "_"): v for n, v in options.items() if n not in _ELSEWHERE}
    config: dict[str, object] = {
        "model_loading_config": {"model_id": name, "model_source": cluster.there(pool.base.path)},
        "engine_kwargs": engine,
        "deployment_config": cluster.scale(_REQUESTS),
    }
    if pool.ranks:
        if adapters is None or not _STORE.match(adapters):
            raise TargetError(
                "Ray Serve LLM loads adapters from object storage alone",
                found=adapters or f"{len(pool.ranks)} adapters of {name}",
                expected="s3://, gs://, abfss:// or azure:// and a folder",
                remedy="name the place with --adapters-at; with --output the adapters are written "
                "for it",
            )
        config["lora_config"] = {
            "dynamic_lora_loading_path": f"{adapters.rstrip('/')}/{adapter_id(name)}",
            "max_num_adapters_per_replica": pool.max_cpu_loras,
        }
    return config
