"""`dora-serve env`."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import click

from converters.errors import OutputError
from converters.files.cache import cache_folder
from converters.files.cores import cores
from converters.files.memory import memory

from . import common

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@click.command("env")
@common.json_option
@common.reports_errors
def command(as_json: bool) -> None:
    """Show versions, processor, memory, cache, and which extras work here: for bug reports."""
    packages = _packages()
    told: dict[str, Any] = {
        "dora-serve": version("dora-serve"),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cores": len(cores()),
        "memory": common.size(memory()),
        "processor": _features(),
        "cache": _cache(),
        "packages": {name: found for name, (found, _) in packages.items() if found},
        "missing": {name: extras for name, (found, extras) in packages.items() if not found},
    }
    if as_json:
        common.print_json(told)
        return
    for name, value in told.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        elif isinstance(value, list):
            value = " ".join(value)
        click.echo(f"{name:<12}{value or 'none'}")


def _cache() -> str:
    try:
        return str(cache_folder())
    except OutputError as error:
        return error.message


def _packages() -> dict[str, tuple[str | None, str]]:
    """Package → its version here, and the extras that bring it; those of development apart."""
    found: dict[str, tuple[str | None, str]] = {}
    for line in requires("dora-serve") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if name == "dora-serve" or (extra and extra[1] == "dev"):
            continue
        try:
            here = version(name)
        except PackageNotFoundError:
            here = None
        found[name] = here, f"(extra {extra[1]})" if extra else ""
    return found


def _features() -> list[str]:
    """What of the processor's features the kernels of ONNX Runtime use, where the system tells."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return [platform.machine(), *(name for name in _FEATURES if name in words)]
