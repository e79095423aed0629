"""`dora-serve watch DIR`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from converters.errors import visible

from ..wording import in_flags
from . import common


@click.command("watch")
@click.argument("folder", metavar="DIR", type=common.FOLDER)
@click.option(
    "--server",
    "urls",
    metavar="URL",
    multiple=True,
    required=True,
    help="A vLLM server, as http://HOST:PORT; once for each replica.",
)
@common.base_option
@click.option("--api-key", envvar="DORA_SERVE_API_KEY", help="The servers' key.")
@click.option(
    "--interval", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds."
)
@click.option("--once", is_flag=True, help="Make equal now, and end; exit code 1 on failures.")
@click.option(
    "--keep", is_flag=True, help="A run that can no longer be served goes on as it was, until gone."
)
@common.reports_errors
def command(
    folder: Path,
    urls: tuple[str, ...],
    base: str | None,
    api_key: str | None,
    interval: float,
    once: bool,
    keep: bool,
) -> None:
    """Keep the adapters of vLLM servers equal to the runs and adapters in DIR.

    What appears is converted and loaded, what changes is reloaded, what can no longer be served is
    refused with the reason, what goes is unloaded, on every server given; a server that restarts
    gets all of them again. The servers must have been started with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (`dora-serve up --live` does).
    """
    # Of what a conversion imports this takes the longest: on a busy machine ten seconds, in which
    # no change would be followed.
    import torch
    import transformers.modeling_utils  # noqa: F401

    from converters.errors import MissingError, OutputError
    from converters.model.base import open_base
    from dora_serve.vllm.desired import SETTLE, Following
    from dora_serve.vllm.kept_names import links
    from dora_serve.vllm.watch import Server, reconcile

    # The cores are the servers': two threads that wait for each other beside theirs at every small
    # step take a minute for a tiny adapter.
    torch.set_num_threads(1)
    given = None if base is None else open_base(base)
    following = Following(folder, given=given, keep=keep)
    wanted = following.at_rest() if once else following.look()
    servers = [Server(url, api_key) for url in urls]
    told: set[str] = set()
    pause = SETTLE
    while True:
        time.sleep(pause)
        lines = []
        failed = False
        try:
            wanted = following.look()
        except MissingError as error:  # a disk that is away: all stays as it is
            failed = True
            lines.append(str(error))
        lines += [
            f"left out: {name}: {in_flags(text).splitlines()[0]}"
            for name, text in wanted.problems.items()
        ]
        lines += [f"warning: {name}: {text}" for name, text in wanted.warnings.items()]
        if once:
            lines += [f"left out: {name}: the run is being written" for name in wanted.moving]
        for server in servers:
            try:
                for change in reconcile(server, wanted, links(folder), keep=keep):
                    failed |= change.done == "failed"
                    line = f"{change.server} {change.done} {change.name} {change.error}".strip()
                    if change.done == "failed":
                        lines.append(line)
                    else:
                        click.echo(visible(line))
            except OutputError as error:
                failed = True
                lines.append(str(error))
            except OSError as error:
                failed = True
                lines.append(f"{server.url} does not answer: {error}")
        for line in lines:
            if line not in told:
                click.secho(visible(line), fg="yellow", err=True)
        told = set(lines)
        if once:
            raise SystemExit(int(failed or following.moving))
        pause = SETTLE if following.moving else interval
