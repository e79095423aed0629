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
@common.reports_errors
def command(
    folder: Path,
    urls: tuple[str, ...],
    base: str | None,
    api_key: str | None,
    interval: float,
    once: bool,
) -> None:
    """Keep the adapters of vLLM servers equal to the runs and adapters in DIR.

    What appears is converted and loaded, what changes is reloaded in place, what goes is unloaded,
    on every server given; a server that restarts gets all of them again. The servers must have
    been started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (`dora-serve up --live` does).
    """
    from dora_serve.vllm.watch import Server, desired, links, reconcile

    servers = [Server(url, api_key) for url in urls]
    told: set[str] = set()
    last: set[str] = set()
    while True:
        wanted = desired(folder, base)
        # A run that is half written, or away between two renames, is still wanted.
        kept = last | wanted.problems.keys()
        last = set(wanted.adapters)
        lines = [
            f"left out: {n}: {in_flags(text).splitlines()[0]}"
            for n, text in wanted.problems.items()
        ]
        lines += [f"warning: {name}: {text}" for name, text in wanted.warnings.items()]
        failed = False
        for server in servers:
            try:
                for change in reconcile(server, wanted.adapters, links(folder), kept):
                    failed |= change.done == "failed"
                    line = f"{change.server} {change.done} {change.name} {change.error}".strip()
                    if change.done == "failed":
                        lines.append(line)
                    else:
                        click.echo(visible(line))
            except OSError as error:
                failed = True
                lines.append(f"{server.url} does not answer: {error}")
        for line in lines:
            if line not in told:
                click.secho(visible(line), fg="yellow", err=True)
        told = set(lines)
        if once:
            raise SystemExit(int(failed))
        time.sleep(interval)
