"""The command lines `dora-export` and `dora-serve`: one small file per verb, imported when used."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from traceback import extract_tb
from typing import Any, NoReturn

import click

from ..wording import json_text
from . import common
from .examples import shown

_WANTS_JSON = "dora_serve.json"
_INTERRUPTED = 130  # 128 and the number of SIGINT, as a shell tells it
_EXPORT_VERBS = {
    "inspect": "Show a run: method, ranks, sizes, and what each target accepts.",
    "merge": "Merge a run into its base model: a Hugging Face folder.",
    "adapter": "Repack a run as a compact LoRA adapter, another rank per module.",
    "export": "Write a run for any installed target.",
    "extract": "Write what a tuned model changed of its base as an adapter.",
    "diff": "Compare the updates of two runs, adapters or models.",
    "onnx": "Export for ONNX Runtime: merged, or one graph with many adapters.",
    "batch": "Convert many runs: a manifest's, or all in a folder.",
    "verify": "Compare an artifact with the live, unmerged run.",
    "check": "Tell whether an artifact still is what its certificate says.",
    "sign": "Sign an artifact with a private key.",
    "lint": "Tell whether engines compute with a LoRA adapter what PEFT computes.",
}
_SERVE_VERBS = {
    "up": "Serve everything in a folder.",
    "plan": "Say how vLLM should serve a folder: ranks, memory, command line.",
    "deploy": "Write the configuration that serves a folder on Ray or Kubernetes.",
    "watch": "Keep the adapters of running vLLM servers equal to a folder.",
    "env": "Show versions, processor, cache and what works here: for bug reports.",
}


class _LazyGroup(click.Group):
    """Knows its verbs by name and imports only the one that is called."""

    def __init__(self, *args: Any, verbs: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in self._verbs:
            return None
        command: click.Command = import_module(f"dora_serve.commands.{cmd_name}").command
        command.epilog = shown(str(self.name), cmd_name)
        command.params += [each for each in common.loudness() if each.name not in _names(command)]
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WANTS_JSON] = "--json" in args
        ctx.color = _colour()
        with _usage_as_json(ctx):
            return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _have_streams()
        _have_folder()
        _write_all()
        _escape()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            printing = extract_tb(error.__traceback__)[-1].name == click.echo.__name__
            if not (_dropped() or printing):
                raise
            with contextlib.suppress(OSError):
                click.secho(f"error: printing failed: {error.strerror}", fg="red", err=True)
            _dropped()
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _usage_as_json(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("stopped by Ctrl-C", err=True)
            ctx.exit(_INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(self._verbs.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._verbs and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], self._verbs, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@contextlib.contextmanager
def _usage_as_json(ctx: click.Context) -> Iterator[None]:
    """Tell a wrong use as any other error where JSON is asked for; click tells people."""
    try:
        yield
    except click.UsageError as error:
        if ctx.meta[_WANTS_JSON]:
            program = (error.ctx or ctx).command_path
            remedy = f"see {program} --help"
            click.echo(json_text({"error": common.usage_fields(error.format_message(), remedy)}))
        raise


def _names(command: click.Command) -> set[str | None]:
    return {each.name for each in command.params}


def _colour() -> bool | None:
    """Whether to write colours, where the user says so: https://no-color.org."""
    if os.environ.get("NO_COLOR"):
        return False
    return True if os.environ.get("FORCE_COLOR") else None


@click.group(
    cls=_LazyGroup,
    verbs=_EXPORT_VERBS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="RUN is a checkpoint folder, the task folder above it, or an adapter folder. "
    "Exit codes: 0 done, 1 refused, failed or not proved, 2 wrong usage, 130 stopped by Ctrl-C.",
    name="dora-export",
)
@click.version_option(version("dora-serve"), prog_name="dora-export")
def dora_export() -> None:
    """Take a finished LoRA-like fine-tune to production, exactly: merge, repack, export, prove."""


@click.group(
    cls=_LazyGroup,
    verbs=_SERVE_VERBS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="DIR holds base models, runs and adapters, at any depth. "
    "Exit codes: 0 done, also of a server that was told to end, by Ctrl-C too; 1 refused or "
    "failed, 2 wrong usage, 130 stopped by Ctrl-C before it served.",
    name="dora-serve",
)
@click.version_option(version("dora-serve"), prog_name="dora-serve")
def dora_serve() -> None:
    """Serve training runs and adapters."""


def _have_streams() -> None:
    """Open what a shell or another program has closed of standard input, output and error. Else
    the next file that is opened takes its number, and a library that tells something on standard
    error writes it into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(opened, mode, encoding="utf-8"))


def _have_folder() -> None:
    """End where the current folder is gone: every path from it leads nowhere, and torch's own
    libraries end the process with a word about themselves."""
    try:
        Path.cwd()
    except FileNotFoundError:
        click.secho("error: the current folder is gone: change to another", fg="red", err=True)
        sys.exit(1)


def _write_all() -> None:
    """Let standard output and error write all they are given, or fail. Unbuffered, as in many
    containers (PYTHONUNBUFFERED), Python drops what a nearly full disk did not take of one call."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = getattr(stream, "buffer", None)
        if isinstance(raw, io.FileIO):
            whole = io.BufferedWriter(io.FileIO(raw.fileno(), "wb", closefd=False))
            text = io.TextIOWrapper(whole, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, text)


def _escape() -> None:
    """Let standard output show signs that its encoding lacks as JSON escapes them."""
    codecs.register_error("escape", _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="escape")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _dropped() -> bool:
    """Whether standard output or error takes no more, as of a full disk. What is left for it is
    dropped, so that the end of the process does not fail by it again."""
    failed = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            failed = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return failed


def run_export() -> NoReturn:
    """The console script `dora-export`: ends the process without taking torch down piece by piece,
    which would cost a third of a second."""
    try:
        dora_export()
    except SystemExit as done:
        code = done.code
    atexit._run_exitfuncs()  # others tidy up there, as multiprocessing its temporary folder
    with contextlib.suppress(BrokenPipeError):  # as in `dora-export inspect RUN | head -1`
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
