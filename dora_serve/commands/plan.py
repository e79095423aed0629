"""`dora-serve plan DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from converters.errors import MissingError, visible

from ..progress import progress_bar
from ..wording import quoted
from . import common


@click.command("plan")
@click.argument("folder", metavar="DIR", type=common.FOLDER)
@common.base_option
@click.option("--gpu-memory", type=common.Size(), help="Plan for a GPU of this memory, as 80GB.")
@click.option("--convert", is_flag=True, help="Make the adapters that the command line names.")
@click.option("--png", type=common.FOLDER, help="Draw what is padding to this file.")
@click.option("--yaml", "yaml_path", type=common.FOLDER, help="Write `vllm serve --config`.")
@common.force_option
@common.json_option
@common.reports_errors
def command(
    folder: Path,
    base: str | None,
    gpu_memory: int | None,
    png: Path | None,
    yaml_path: Path | None,
    convert: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Say how vLLM should serve all runs and adapters in DIR: the smallest maximal rank, memory a
    slot and how much of it is padding, and the command line.

    What vLLM cannot serve is left out, with the reason; exit code 1 when nothing is left.
    """
    from dora_serve.folder.inventory import discover
    from dora_serve.rankmap.output import check_apart, check_output_file, write_file
    from dora_serve.vllm.command import (
        command_line,
        find_vllm_or_name,
        has_gpu,
        serve_options,
        shell,
        yaml_file,
    )
    from dora_serve.vllm.convert import vllm_adapter, vllm_adapter_path
    from dora_serve.vllm.fleet import plan_fleet
    from dora_serve.vllm.fleet_view import as_json as view
    from dora_serve.vllm.fleet_view import save_png, table

    if png is not None and yaml_path is not None and png.resolve() == yaml_path.resolve():
        raise click.UsageError("--png and --yaml take a file each")
    for file in filter(None, (png, yaml_path)):
        check_output_file(file, force)
    found = discover(folder, base)
    for file in filter(None, (png, yaml_path)):
        check_apart(file, found.files())
    fleet = plan_fleet(found, gpu_memory)
    if not fleet.pools and not found.problems:
        raise MissingError(
            "no base model lies here",
            file=folder,
            remedy="put one there, and runs or adapters beside it, or name it with `base`",
        )
    program = find_vllm_or_name()
    commands = []
    gpu = gpu_memory is not None or has_gpu()
    place = vllm_adapter if convert else vllm_adapter_path
    with progress_bar(sum(len(p.ranks) for p in fleet.pools), "adapters", "adapter") as advance:
        for pool in fleet.pools:
            paths = {}
            for name in pool.ranks:
                paths[name] = place(found.members[name])
                advance(1)
            commands.append(serve_options(pool, paths, gpu))
    if yaml_path is not None:
        if len(commands) != 1:
            raise click.UsageError(f"--yaml takes one base, and there are {len(commands)}")
        write_file(yaml_path, yaml_file(commands[0]).encode(), force)
    drawn = png is not None and any(pool.ranks for pool in fleet.pools)
    if png is not None and drawn:
        save_png(fleet, png, force)
    if as_json:
        lines = [command_line(options, program) for options in commands]
        told = {**view(fleet), "warnings": found.warnings, "commands": lines}
        common.print_json(told)
        sys.exit(0 if fleet.pools else 1)
    common.left_out({}, found.warnings)
    for line in table(fleet):
        click.echo(line)
    for options in commands:
        click.echo()
        click.echo(shell(command_line(options, program)))
        if "enable-lora" in options and options["dtype"] == "float32":
            click.echo("\nOn a GPU, whose adapter kernels take no float32: --dtype auto")
    for file in filter(None, (yaml_path, png if drawn else None)):
        click.echo(f"\n{visible(file)}: written")
    if commands:
        given = f" --base {quoted(base)}" if base else ""
        where = f"{quoted(folder)}{given}"
        if any(pool.ranks for pool in fleet.pools):
            made = f"are made by `dora-serve plan {where} --convert`,"
            click.echo(f"\nThe adapters {'are' if convert else made} in this machine's cache.")
            other = f"dora-export batch {where} OUT --target vllm"
            click.echo(f"For another machine: `{other}`, or `dora-serve deploy`.")
        click.echo(f"\n`dora-serve up {where} --engine vllm` makes them and runs this.")
    if not fleet.pools:
        raise MissingError(
            "nothing here can be served", file=folder, remedy="see what is said above of each"
        )
