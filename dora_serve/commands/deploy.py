"""`dora-serve deploy DIR`."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from converters.errors import visible

from . import common

if TYPE_CHECKING:
    from dora_serve.deploy import Cluster
    from dora_serve.folder.inventory import Found
    from dora_serve.vllm.fleet import Pool


_RAY, _KUBERNETES = "serve.yaml", "manifests.yaml"
_ADAPTERS = "adapters"
_MARK = "# Written by dora-serve deploy. SHA-256 of what follows: "


@click.command("deploy")
@click.argument("folder", metavar="DIR", type=common.FOLDER)
@click.option("--to", "target", type=click.Choice(["ray", "kubernetes"]), required=True)
@click.option(
    "--engine", type=click.Choice(["vllm", "onnxruntime"]), default="vllm", show_default=True
)
@common.base_option
@click.option("--min-replicas", type=click.IntRange(1), default=1, show_default=True)
@click.option("--max-replicas", type=click.IntRange(1), help="As --min-replicas, unless given.")
@click.option(
    "--models-at",
    metavar="PATH",
    help="Where the servers see DIR.  [its own path for Ray, /models for Kubernetes]",
)
@click.option("--adapters-at", metavar="URL", help="vLLM on Ray: object storage for the adapters.")
@click.option("--image", help="Kubernetes: image with this package, and vLLM where it is used.")
@click.option("--gpu-memory", type=common.Size(), help="vLLM: memory of a device, as 80GB.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="ONNX Runtime: cores of a replica.",
)
@click.option(
    "-o", "--output", type=common.FOLDER, help="Folder to write; else to standard output."
)
@common.force_option
@common.reports_errors
def command(
    folder: Path,
    target: str,
    engine: str,
    base: str | None,
    min_replicas: int,
    max_replicas: int | None,
    models_at: str | None,
    adapters_at: str | None,
    image: str | None,
    gpu_memory: int | None,
    threads: int,
    output: Path | None,
    force: bool,
) -> None:
    """Write the configuration that serves everything in DIR on a cluster, as `plan` says: with vLLM
    a server for each base, or the embedded engine.

    Nothing is started: `serve deploy` (Ray) or `kubectl apply` takes what is written.
    """
    from converters.files.handles import there
    from converters.files.output import output_folder
    from dora_serve.deploy import Cluster, kubernetes, ray_config

    if target == "kubernetes" and not image:
        raise click.UsageError("--to kubernetes needs --image")
    if max_replicas is not None and max_replicas < min_replicas:
        raise click.UsageError("--max-replicas is below --min-replicas")
    default = str(folder.resolve()) if target == "ray" else "/models"
    if models_at == "":
        raise click.UsageError("--models-at is empty")
    at = PurePosixPath(models_at or default)
    if not at.is_absolute() or ".." in at.parts:
        raise click.UsageError("--models-at takes an absolute path")
    if target == "kubernetes" and (str(at) in kubernetes.TAKEN or ":" in str(at)):
        raise click.UsageError(f"Kubernetes cannot show the folder at {at}")
    inputs = [folder, *([Path(base)] if base is not None and there(Path(base)) else [])]
    if output is not None:
        _check_output(output, force, inputs)
    cluster = Cluster(folder, at, min_replicas, max_replicas or min_replicas)
    adapters: dict[str, Path] = {}
    if engine == "onnxruntime":
        base = _embedded(cluster, base)
        if target == "ray":
            text = ray_config.embedded_app(cluster, base, threads)
        else:
            text = kubernetes.embedded_server(cluster, base, threads, str(image))
    else:
        found, pools = _pools(folder, base, gpu_memory, target)
        if target == "ray":
            text = ray_config.vllm_app(cluster, pools, adapters_at)
            if output is not None:
                adapters = _adapters(found, pools)
        else:
            text = kubernetes.vllm_servers(cluster, pools, str(image))
    if output is None:
        click.echo(text, nl=False)
        return
    name = _RAY if target == "ray" else _KUBERNETES
    with output_folder(output) as place:
        (place / name).write_text(_marked(text), encoding="utf-8")
        for adapter, source in adapters.items():
            # Not by copytree, whose errors say nothing of the disk.
            for file in filter(Path.is_file, source.rglob("*")):
                copy = place / _ADAPTERS / adapter / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        _check_output(output, force, inputs)  # what came there meanwhile stays
    click.echo(visible(output / name))
    if adapters:
        click.echo(f"{visible(output / _ADAPTERS)}  (copy what is in it to {adapters_at})")


def _check_output(output: Path, force: bool, inputs: list[Path]) -> None:
    from converters.files.output import check_output, check_place

    check_place(output, inputs)
    if not (force and _is_ours(output)):
        check_output(output, force, inputs)


def _marked(text: str) -> str:
    """`text` with a first line by which it is known for ours as long as nobody edits it."""
    return f"{_MARK}{sha256(text.encode()).hexdigest()}\n{text}"


def _is_ours(output: Path) -> bool:
    """Whether all that the folder `output` holds was written here and nobody changed it."""
    from converters.certificate import strangers

    if not output.is_dir():
        return False
    texts = [output / name for name in (_RAY, _KUBERNETES) if (output / name).is_file()]
    adapters = [*(output / _ADAPTERS).glob("*/*")]
    bases = {path.parent for path in adapters}
    known = {*texts, *adapters, *bases, *[output / _ADAPTERS] * bool(adapters)}
    found = {*output.iterdir(), *(output / _ADAPTERS).glob("*"), *adapters}
    return (
        found == known
        and all(t == _marked(t.partition("\n")[2]) for t in (p.read_text() for p in texts))
        and not any(path.is_symlink() or not path.is_dir() or strangers(path) for path in adapters)
    )


def _embedded(cluster: Cluster, base: str | None) -> str | None:
    """The base as the servers see it; raises `DoraExportError` when there is nothing to serve."""
    from converters.errors import MissingError
    from dora_serve.server.prepare.child import make_offer

    offer = make_offer(cluster.root.resolve(), base, True)
    common.left_out(offer.problems, offer.warnings)
    if not offer.models:
        raise MissingError("nothing here can be served", file=cluster.root)
    for graph in offer.graphs:  # of a hub id the servers have no copy but what they see
        if graph.path is not None:
            cluster.there(Path(graph.path))
    return cluster.there(Path(base)) if base is not None and Path(base).exists() else base


def _pools(
    folder: Path, base: str | None, memory: int | None, target: str
) -> tuple[Found, list[tuple[str, Pool]]]:
    """What vLLM serves, by the name that clients call each base."""
    from converters.errors import RunError
    from dora_serve.folder.inventory import discover
    from dora_serve.vllm.fleet import CLASSIFIES, plan_fleet

    found = discover(folder, base)
    fleet = plan_fleet(found, memory)
    common.left_out(fleet.problems, found.warnings)
    pools = [p for p in fleet.pools if target != "ray" or p.task != CLASSIFIES]
    refused = {
        name: "Ray Serve LLM has no /classify; --engine onnxruntime has"
        for pool in fleet.pools
        if pool not in pools
        for name in pool.ranks or [pool.name]
    }
    common.left_out(refused, {})
    if not pools:
        raise RunError(
            "nothing here can be served by vLLM", file=folder, remedy="see dora-serve plan"
        )
    return found, [(pool.name, pool) for pool in pools]


def _adapters(found: Found, pools: list[tuple[str, Pool]]) -> dict[str, Path]:
    """Every adapter's folder, made now if need be, by its place below the storage's root."""
    from dora_serve.deploy.ray_config import adapter_id
    from dora_serve.vllm.convert import vllm_adapter

    return {
        f"{adapter_id(base)}/{adapter_id(name)}": vllm_adapter(found.members[name])
        for base, pool in pools
        for name in pool.ranks
    }
