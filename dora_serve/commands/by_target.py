"""Verbs that write for a target: its options, declared where it is, are flags of the verb."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from converters.options import FitOptions, ReadOptions, names
from converters.targets.target import targets

from ..progress import progress_bar
from ..wording import quoted
from . import common

_SEEN = "dora_serve.target"


class TargetCommand(click.Command):
    """A command that also has the options of the target that `--target` names, or that it is for
    where none is named."""

    def __init__(self, *args: Any, target: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._target = target

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = [name for word, name in pairwise(args) if word == "--target"]
        given += [word[len("--target=") :] for word in args if word.startswith("--target=")]
        ctx.meta[_SEEN] = given[-1] if given else self._target
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        target = targets().get(str(ctx.meta.get(_SEEN, self._target)))
        own = super().get_params(ctx)
        if target is None:
            return own
        place = [param.name for param in own].index("base")
        return [*own[:place], *common.flags(target.options), *own[place:]]


def target_option(choices: Sequence[str], default: str | None) -> click.Option:
    return click.Option(
        ["--target"],
        type=click.Choice(choices),
        default=default,
        required=default is None,
        show_default=True,
        help="What it is written for; `--target NAME --help` shows the options of NAME.",
    )


def adapters() -> list[str]:
    """The targets that stand beside a base."""
    return [name for name, target in targets().items() if target.kind == "adapter"]


def writes(
    verb: str,
    help: str,
    choices: Sequence[str] = (),
    target: str | None = None,
    options: Sequence[click.Option] = (),
) -> click.Command:
    """The command that reads RUN and writes OUT for one of `choices`, by default `target`, or for
    `target` alone."""
    write: Any = _write if choices else partial(_write, target=str(target))
    callback = common.reports_errors(write)
    command = TargetCommand(verb, target=target, callback=callback, help=help)
    command.params = [
        click.Argument(["run"], type=common.INPUT),
        click.Argument(["out"], type=common.OUTPUT),
        *common.flags(ReadOptions),
        *([target_option(choices, target), *common.flags(FitOptions)] if choices else []),
        *options,
    ]
    for more in (
        common.base_option,
        common.dry_run_option,
        common.force_option,
        common.json_option,
    ):
        more(command)
    return command


def _write(
    run: Path,
    out: Path,
    base: str | None,
    target: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
    resume: bool = False,
    **options: Any,
) -> None:
    from dora_serve.api import export

    common.one_limit(options)
    read = {name: options.pop(name) for name in names(ReadOptions) if name in options}
    loaded = common.load_run(run, base, **read)
    artifact = export(
        loaded,
        out,
        target,
        base=base,
        force=force,
        resume=resume,
        dry_run=dry_run,
        progress=partial(progress_bar, text="writing"),
        **options,
    )
    plan, more = artifact.plan, []
    if plan.base is not None:
        more.append(f"base: {common.base_said(loaded, plan.base)}")
    if artifact.written and plan.base is not None and targets()[target].engines:
        words = (run, out, "--base", plan.base.name, *common.as_words(ReadOptions, read))
        more += [f"check it: dora-export verify {' '.join(map(quoted, words))}"]
    common.show(artifact, as_json, *more)
