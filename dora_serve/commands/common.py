"""What the verbs share: options, errors as one red line, progress, JSON."""

from __future__ import annotations

import errno
import functools
import io
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

import click

from converters import progress
from converters.errors import DoraExportError, visible
from converters.options import SHORT, FitOptions, ReadOptions, names

from ..extras import quiet, without_extra
from ..progress import LOUDNESS, is_said, progress_bar
from ..remote.local import Remote, is_url, local_values
from ..wording import alike, in_flags, json_text

if TYPE_CHECKING:
    from converters.model.base import BaseModel
    from converters.run import Run
    from converters.targets.publish import Artifact
    from converters.targets.target import Plan, Report

F = TypeVar("F", bound=Callable[..., Any])

FIELDS = ("message", "file", "tensor", "found", "expected", "remedy")  # of an error


class PathOrUrl(click.Path):
    """A path; where `role` is one, also a URL, which `reports_errors` makes a local path of."""

    def __init__(self, role: Literal["input", "output"] | None = None) -> None:
        super().__init__(path_type=Path)
        self.role = role

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_url(value):
            self._check(str(value), param, ctx)
            return super().convert(value, param, ctx)
        if self.role is None:
            self.fail("a local path is needed here, not a URL", param, ctx)
        return Remote(value, output=self.role == "output")

    def _check(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> None:
        """Refuse what no path can be: nothing, as of a variable that is not set, or a link to
        itself."""
        if not value:
            self.fail("the path is empty", param, ctx)
        try:
            Path(value).stat()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass  # whoever needs it says so
        except (OSError, ValueError) as error:
            self.fail(f"no possible path: {visible(value)}: {error.args[-1]}", param, ctx)


class Source(click.ParamType[Any]):
    """Text that names a folder or a hub id, `NAME=` before it or not; a URL becomes a folder."""

    name = "text"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if not value:
            self.fail("it is empty", param, ctx)
        before, equals, url = str(value).partition("=")  # a URL may have more
        if is_url(value):
            return Remote(str(value), make=str)
        if equals and is_url(url):
            return Remote(url, make=lambda path: f"{before}={path}")
        return value


FOLDER, INPUT, OUTPUT = PathOrUrl(), PathOrUrl("input"), PathOrUrl("output")
SOURCE = Source()


def last_is_output(
    _ctx: click.Context, _param: click.Parameter, value: tuple[Path | Remote, ...]
) -> tuple[Path | Remote, ...]:
    """For an argument of several paths, the last of which is written."""
    *inputs, out = value
    return (*inputs, replace(out, output=True) if isinstance(out, Remote) else out)


class Size(click.ParamType[int]):
    """Bytes, written as 80GB or 24GiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size such as 80GB or 24GiB", param, ctx)
        number, unit, binary = match.groups()
        power = "KMGT".index(unit.upper()) + 1 if unit else 0
        return int(float(number) * (1024 if binary else 1000) ** power)


class _Choice(click.Choice[str]):
    """One of several words; a dtype by its short name too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        known = value in self.choices
        return super().convert(value if known else SHORT.get(value, value), param, ctx)


def flags(options: type) -> list[click.Option]:
    """The options of a command for the fields of a dataclass that `option` made."""
    hints = get_type_hints(options)
    return [_flag(each, hints[each.name]) for each in fields(options) if "help" in each.metadata]


def _flag(field: Field[Any], hint: Any) -> click.Option:
    about = field.metadata
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    kind: Any = kinds[0]
    low, high = about["low"], about["high"]
    if about["choices"]:
        kind = _Choice(about["choices"])
    elif kind is Path:
        kind = INPUT
    elif kind is int and low is not None:
        kind = click.IntRange(low, high)
    elif kind is float and low is not None:
        kind = click.FloatRange(low, high, min_open=True)
    several = isinstance(field.default, tuple)
    switch = kind is bool
    return click.Option(
        [f"--{(about['flag'] or field.name).replace('_', '-')}", field.name],
        type=None if switch else kind,
        is_flag=switch,
        multiple=several,
        default=field.default if several or switch or field.default is not None else None,
        show_default=isinstance(field.default, str),
        metavar=about["metavar"],
        help=about["help"],
    )


def as_words(options: type, given: Mapping[str, Any]) -> list[str]:
    """What of `given` was said, as the flags of the dataclass say it, to be copied."""
    words: list[str] = []
    for flag in flags(options):
        value = given.get(str(flag.name))
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            words += [flag.opts[0], str(each)]
    return words


def takes(options: type) -> Callable[[F], F]:
    """Give a command the flags of a dataclass."""

    def decorate(function: F) -> F:
        known = function.__dict__.setdefault("__click_params__", [])
        known.extend(reversed(flags(options)))
        return function

    return decorate


def one_limit(given: Mapping[str, Any]) -> None:
    """Raise a usage error where several of `FitOptions` are given."""
    if sum(given.get(name) is not None for name in names(FitOptions)) > 1:
        raise click.UsageError("give one of --max-rank, --energy and --budget")


def run_argument(function: F) -> F:
    """The RUN argument and the options for what a run may leave out."""
    return click.argument("run", type=INPUT)(takes(ReadOptions)(function))


base_option = click.option(
    "--base",
    metavar="DIR_OR_ID",
    type=SOURCE,
    help="Base model: a folder, a URL, or a hub id in the local cache.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
force_option = click.option("--force", is_flag=True, help="Replace an output that is there.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check and show the plan only.")


def loudness() -> list[click.Option]:
    """What every verb takes, and `_said` and `progress_bar` heed."""

    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and ctx.meta.setdefault(LOUDNESS, param.name) != param.name:
            raise click.UsageError("give one of --quiet and --verbose")

    return [
        click.Option(
            [f"--{name}", f"-{name[0]}"], is_flag=True, expose_value=False, callback=note, help=told
        )
        for name, told in (
            ("quiet", "Say nothing on stdout but JSON, and show no progress."),
            ("verbose", "Show where in the code an error arose, and the time it took."),
        )
    ]


@contextmanager
def _said(as_json: bool) -> Iterator[None]:
    """Let nothing of a quiet command reach stdout; a verbose one ends with its time."""
    begun = time.monotonic()
    with redirect_stdout(io.StringIO()) if is_said("quiet") and not as_json else nullcontext():
        try:
            yield
        finally:
            if is_said("verbose"):
                click.echo(f"{time.monotonic() - begun:.1f} s", err=True)


def load_run(run: Path, base: str | None, **options: Any) -> Run:
    """Read RUN with the options of `run_argument`, with a warning where it names another base."""
    from converters.model.base import open_base
    from converters.readers import read_run
    from dora_serve.folder.pairing import told

    loaded = read_run(run, ReadOptions(base=base, **options))
    return loaded if base is None else told(loaded, open_base(base))


def show(artifact: Artifact, as_json: bool, *more: str, report: bool = True) -> None:
    """Tell what was written, or what would be, and then `more`."""
    plan: Plan = artifact.plan
    told: Report = artifact.report
    if as_json:
        said = {
            "output": str(artifact.path),
            "written": artifact.written,
            "target": plan.target,
            "bytes": plan.nbytes,
            **plan.summary(),
            **(told.summary() if report else {}),
            **({"accuracy": artifact.accuracy} if artifact.accuracy else {}),
            "warnings": list(artifact.warnings),
        }
        print_json(said)
    else:
        first, *lines = (*plan.lines(), *told.lines(), *more)
        would = "" if artifact.written else "would write "
        click.echo(visible(f"{would}{artifact.path}: {first}, {size(plan.nbytes)}"))
        for line in lines:
            click.echo(f"  {visible(line)}")
    warn(artifact.warnings)


def base_said(run: Run, base: BaseModel) -> str:
    """What `base` is; a QLoRA's configuration does not tell that it was trained on another one."""
    if base.stored is not None or base.packed:
        return f"{base.name}, quantized"
    asked = "; for a QLoRA, --base is what save_pretrained(FOLDER) wrote of the quantized base"
    return f"{base.name}, not quantized" + asked * run.method.startswith("peft_")


def reports_errors(function: F) -> F:
    """Turn a `DoraExportError`, or an optional package that is not installed, into a red message on
    stderr (or JSON) and exit code 1.

    Paths given as URLs are local paths for the function.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        progress.show(progress_bar)
        quiet()
        try:
            with (
                _said(bool(kwargs.get("as_json"))),
                local_values(kwargs, progress_bar) as values,
            ):
                return function(*args, **values)
        except Exception as error:
            from converters.errors import OutputError

            error = without_extra(error) or error
            if not isinstance(error, DoraExportError):
                if not isinstance(error, OSError) or error.filename is None:
                    raise
                # A path that an option names: no folder to write to, no right to read.
                error = OutputError(
                    f"reading or writing failed: {error.strerror}", file=error.filename
                )
            if kwargs.get("as_json"):
                click.echo(json_text({"error": _fields(error)}))
            if is_said("verbose"):
                traceback.print_exception(error)
            click.secho(f"error: {in_flags(error)}", fg="red", err=True)
            sys.exit(1)

    return wrapped  # type: ignore[return-value]


def _fields(error: DoraExportError) -> dict[str, str | None]:
    """What `--json` tells of a `DoraExportError`."""
    told = {name: getattr(error, name) for name in FIELDS}
    shown = {name: None if v is None else in_flags(visible(v)) for name, v in told.items()}
    return {"code": type(error).__name__, **shown}


def usage_fields(message: str, remedy: str) -> dict[str, str | None]:
    """What `--json` tells of a wrong use, in the same fields."""
    return {"code": "UsageError", **dict.fromkeys(FIELDS), "message": message, "remedy": remedy}


def warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        click.secho(f"warning: {in_flags(visible(warning))}", fg="yellow", err=True)


def left_out(problems: Mapping[str, str], warnings: Mapping[str, str]) -> None:
    """Say what of a folder is not served and why, and what to know of the rest."""
    for said, told in (("left out", problems), ("warning", warnings)):
        for whose, lines in alike(told):
            click.secho(f"{said}: {whose}: " + "\n".join(lines), fg="yellow", err=True)


def print_json(value: object) -> None:
    click.echo(json_text(value, indent=2))


def check_port(host: str, port: int) -> None:
    """Raise `OutputError` where nothing can listen there, before hours of work are for it."""
    from converters.errors import OutputError

    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        missing = [_no_address(family, kind, number, at) for family, kind, number, _, at in where]
        if None not in missing:
            raise OSError(f"this machine has no such address: {missing[0]}")
    except OSError as error:
        raise OutputError(
            f"nothing can listen on port {port} of {host}",
            found=error.strerror or error,
            remedy="stop what uses it, or name another with `port`",
        ) from None


def _no_address(family: int, kind: int, protocol: int, address: Any) -> OSError | None:
    """Why the machine has no such address, as with IPv6 off; None where something can listen there.
    Raises `OSError` where it has, and nothing can."""
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return error
        raise
    return None


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
