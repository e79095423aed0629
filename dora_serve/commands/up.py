"""`dora-serve up DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import common


@click.command("up")
@click.argument("folder", metavar="DIR", type=common.FOLDER)
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS]")
@click.option(
    "--engine", type=click.Choice(["onnxruntime", "vllm"]), default="onnxruntime", show_default=True
)
@common.base_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--api-key", envvar="DORA_SERVE_API_KEY", help="Key clients must send [$DORA_SERVE_API_KEY]."
)
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime: threads of each model.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="ONNX Runtime: batches of an encoder at once.",
)
@click.option("--gpu-memory", type=common.Size(), help="vLLM: memory of the device, as 80GB.")
@click.option("--vllm", metavar="PROGRAM", help="vLLM: its program or its Python, if elsewhere.")
@click.option("--live", is_flag=True, help="vLLM: serve runs too that appear or change later.")
@common.dry_run_option
@common.reports_errors
def command(
    folder: Path,
    more: tuple[str, ...],
    engine: str,
    base: str | None,
    host: str,
    port: int,
    api_key: str | None,
    threads: int | None,
    workers: int,
    gpu_memory: int | None,
    vllm: str | None,
    live: bool,
    dry_run: bool,
) -> None:
    """Serve everything in DIR: base models, training runs and adapters, each by its name.

    What has to be converted is converted once and kept in the cache ($DORA_SERVE_CACHE, else the
    user's cache folder). With --engine vllm what follows `--` goes to `vllm serve` untouched.
    """
    if engine == "vllm":
        from dora_serve.engines import vllm_up

        vllm_up.up(
            folder,
            base=base,
            host=host,
            port=port,
            api_key=api_key,
            memory=gpu_memory,
            vllm=vllm,
            live=live,
            dry_run=dry_run,
            more=more,
        )
        return
    if more:
        raise click.UsageError("arguments after -- are for --engine vllm")
    from dora_serve.server.options import ServerOptions
    from dora_serve.server.up import up

    options = ServerOptions(threads=threads, workers=workers)
    sys.exit(up(folder, base, host, port, api_key, dry_run, options))
