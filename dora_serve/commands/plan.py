"""`dora-serve plan DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from . import common


@click.command("plan")
@click.argument("folder", metavar="DIR", type=common.FOLDER)
@common.base_option
@click.option("--gpu-memory", type=common.Size(), help="Memory of the device, such as 80GB.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw what is padding to this file.")
@click.option(
    "--yaml", "yaml_path", type=click.Path(path_type=Path), help="Write `vllm serve --config`."
)
@common.json_option
@common.reports_errors
def command(
    folder: Path,
    base: str | None,
    gpu_memory: int | None,
    png: Path | None,
    yaml_path: Path | None,
    as_json: bool,
) -> None:
    """Say how vLLM should serve all runs and adapters in DIR: the smallest maximal rank, memory a
    slot and how much of it is padding, and the command line. Writes no adapter.
    """
    from dora_serve.folder.inventory import discover
    from dora_serve.vllm.command import command_line, serve_options, shell, yaml_file
    from dora_serve.vllm.convert import vllm_adapter_path
    from dora_serve.vllm.fleet import plan_fleet
    from dora_serve.vllm.fleet_view import as_json as view
    from dora_serve.vllm.fleet_view import save_png, table

    found = discover(folder, base)
    fleet = plan_fleet(found, gpu_memory)
    commands = []
    for pool in fleet.pools:
        paths = {name: vllm_adapter_path(found.members[name]) for name in pool.ranks}
        commands.append(serve_options(pool, paths))
    if yaml_path is not None:
        if len(commands) != 1:
            raise click.UsageError(f"--yaml takes one base, and there are {len(commands)}")
        yaml_path.write_text(yaml_file(commands[0]), encoding="utf-8")
    if png is not None and any(pool.ranks for pool in fleet.pools):
        save_png(fleet, png)
    if as_json:
        lines = [command_line(options) for options in commands]
        told = {**view(fleet), "warnings": found.warnings, "commands": lines}
        common.print_json(told)
        return
    common.left_out({}, found.warnings)
    for line in table(fleet):
        click.echo(line)
    for options in commands:
        click.echo()
        click.echo(shell(command_line(options)))
    if commands:
        given = f" --base {base}" if base else ""
        click.echo(f"\n`dora-serve up {folder}{given} --engine vllm` converts and runs this.")
