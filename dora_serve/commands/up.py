"""`dora-serve up DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from . import common

_ONLY = {  # parameters that one engine alone has
    "onnxruntime": {
        "threads": "--threads",
        "workers": "--workers",
        "precision": "--precision",
        "prefix_cache": "--prefix-cache",
        "generation_config": "--generation-config",
        "chat_template": "--chat-template",
    },
    "vllm": {
        "gpu_memory": "--gpu-memory",
        "vllm": "--vllm",
        "live": "--live",
        "keep": "--keep",
    },
}


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
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "int8", "int4"]),
    default="auto",
    show_default=True,
    help="ONNX Runtime: of the weights; auto is the most exact that fits a quarter of the memory.",
)
@click.option(
    "--prefix-cache",
    type=common.Size(),
    help="ONNX Runtime: memory, shared by the bases, for keys and values of earlier texts, which "
    "are not computed again where a prompt begins with them, as 4GB; 0 keeps none  "
    "[default: a sixteenth of the memory]",
)
@click.option(
    "--generation-config",
    metavar="auto|vllm|DIR",
    default="auto",
    show_default=True,
    help="ONNX Runtime: what requests leave open, as the base's generation_config.json says it, "
    "as vLLM does without one, or as that in DIR says it.",
)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    metavar="FILE",
    help="ONNX Runtime: a chat template in place of every base's own.",
)
@click.option("--gpu-memory", type=common.Size(), help="vLLM: memory of the device, as 80GB.")
@click.option("--vllm", metavar="PROGRAM", help="vLLM: its program or its Python, if elsewhere.")
@click.option("--live", is_flag=True, help="vLLM: follow what appears, changes or goes later.")
@click.option(
    "--keep",
    is_flag=True,
    help="With --live: a run that can no longer be served goes on as it was.",
)
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
    precision: str,
    prefix_cache: int | None,
    generation_config: str,
    chat_template: str | None,
    gpu_memory: int | None,
    vllm: str | None,
    live: bool,
    keep: bool,
    dry_run: bool,
) -> None:
    """Serve everything in DIR: base models, training runs and adapters, each by its name.

    What has to be converted is converted once and kept in the cache ($DORA_SERVE_CACHE, else the
    user's cache folder). What cannot be served is told and left out. With --engine vllm what
    follows `--` goes to `vllm serve` untouched.
    """
    _check(engine, more)
    if api_key == "":  # of a variable that is not set: everybody would have it
        raise click.UsageError("--api-key is empty")
    if not dry_run:
        common.check_port(host, port)
    if engine == "vllm":
        from dora_serve.vllm import up as vllm_up

        vllm_up.up(
            folder,
            base=base,
            host=host,
            port=port,
            api_key=api_key,
            memory=gpu_memory,
            vllm=vllm,
            live=live,
            keep=keep,
            dry_run=dry_run,
            more=more,
        )
        return
    from dora_serve.onnxruntime.limits import Limits
    from dora_serve.server.options import ServerOptions
    from dora_serve.server.up import up

    limits = Limits() if prefix_cache is None else Limits(prefix_bytes=prefix_cache)
    options = ServerOptions(
        threads=threads,
        workers=workers,
        precision=precision,
        generation_config=generation_config,
        chat_template=chat_template,
        limits=limits,
    )
    sys.exit(up(folder, base, host, port, api_key, dry_run, options))


def _check(engine: str, more: Sequence[str]) -> None:
    """Refuse what the engine would not heed, and what would keep us from watching vLLM."""
    context = click.get_current_context()
    for other, parameters in _ONLY.items():
        for name, option in parameters.items():
            given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
            if given and other != engine:
                raise click.UsageError(f"{option} is for --engine {other}, not for {engine}")
    if more and engine != "vllm":
        raise click.UsageError("arguments after -- are for --engine vllm")
    if more:
        from dora_serve.vllm.command import why_not

        for word in more:
            if why := why_not(word):
                raise click.UsageError(why)
