"""`dora-serve watch DIR`."""

from __future__ import annotations

import time
from pathlib import Path

import click

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

    from converters.errors import MissingError
    from converters.model.base import open_base
    from dora_serve.vllm.desired import SETTLE, Following
    from dora_serve.vllm.kept_names import links
    from dora_serve.vllm.replicas import Replica, Told
    from dora_serve.vllm.watch import Server

    # The cores are the servers': two threads that wait for each other beside theirs at every small
    # step take a minute for a tiny adapter.
    torch.set_num_threads(1)
    given = None if base is None else open_base(base)
    following = Following(folder, given=given, keep=keep)
    wanted = following.at_rest() if once else following.look()
    ours = links(folder)
    replicas = [Replica(Server(url, api_key), ours, keep=keep) for url in urls]
    told, pause = Told(), SETTLE
    while True:
        time.sleep(pause)
        lines = []
        away = False
        try:
            wanted = following.look()
        except MissingError as error:  # a disk that is away: all stays as it is
            away = True
            lines.append(str(error))
        lines += [
            f"left out: {name}: {in_flags(text).splitlines()[0]}"
            for name, text in wanted.problems.items()
        ]
        lines += [f"warning: {name}: {text}" for name, text in wanted.warnings.items()]
        if once:
            lines += [f"left out: {name}: the run is being written" for name in wanted.moving]
        told.tell(lines)
        for replica in replicas:
            replica.follow(wanted)
        end = time.monotonic() + interval
        for replica in replicas:
            replica.wait(None if once else max(end - time.monotonic(), 0))
        if once:
            failed = away or any(replica.failed for replica in replicas)
            raise SystemExit(int(failed or following.moving))
        pause = SETTLE if following.moving else interval
