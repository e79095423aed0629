"""Write what docs/reference/ shows of commands and of the HTTP API, from click and from OpenAPI.

    python scripts/reference.py FOLDER

`commands.md` and `http.md` are made anew for every build of the site, so that they are never old.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dora_serve.commands import dora_export, dora_serve

_WIDTH = 88


def commands() -> Iterator[str]:
    """The help of every verb, as a terminal shows it."""
    for group in (dora_export, dora_serve):
        yield f"## {group.name}\n\n{group.help}\n"
        above = click.Context(group, info_name=group.name)
        for verb in group.list_commands(above):
            command = group.get_command(above, verb)
            assert command is not None
            context = click.Context(
                command, above, info_name=verb, terminal_width=_WIDTH, max_content_width=_WIDTH
            )
            yield f"### {group.name} {verb}\n\n```text\n{command.get_help(context)}\n```\n"


def http() -> Iterator[str]:
    """Every operation, with the fields of what it takes."""
    described = _openapi()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            yield f"## {method.upper()} {path}\n"
            if "description" in operation:
                yield operation["description"] + "\n"
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            rows = [*_parameters(operation), *_fields(body.get("schema", {}), described)]
            if rows:
                yield "\n".join(["| takes | type | default |", "|---|---|---|", *rows]) + "\n"


def _openapi() -> dict[str, Any]:
    from dora_serve.server.app import make_app
    from dora_serve.server.options import ServerOptions
    from dora_serve.server.prepare.offer import Offer
    from dora_serve.server.registry import Registry
    from dora_serve.server.state import State

    options = ServerOptions()
    registry = Registry(Offer(graphs=[], models=[], problems={}), options)
    return make_app(State(Path(), registry, options), "127.0.0.1", None).openapi()


def _parameters(operation: dict[str, Any]) -> Iterator[str]:
    for each in operation.get("parameters", []):
        yield f"| `{each['name']}` (in the {each['in']}) | {_type(each['schema'])} | |"


def _fields(schema: dict[str, Any], described: dict[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        schema = described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    needed = schema.get("required", [])
    for name, each in schema.get("properties", {}).items():
        default = "" if each.get("default") is None else f"`{each['default']}`"
        yield f"| `{name}` | {_type(each)} | {'needed' if name in needed else default} |"


def _type(schema: dict[str, Any]) -> str:
    kinds = schema.get("anyOf", [schema])
    named = [
        each.get("$ref", "").rpartition("/")[2] or each.get("type", "any JSON") for each in kinds
    ]
    return " or ".join(dict.fromkeys(kind for kind in named if kind != "null")) or "null"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("commands.md", commands()), ("http.md", http())):
        (folder / name).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
