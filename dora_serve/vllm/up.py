"""`dora-serve up --engine vllm`: everything of one base in a folder, served by one vLLM."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from converters.errors import DoraExportError, MissingError, RunError, TargetError, visible
from converters.files.cache import private_cache

from ..commands.common import left_out
from ..folder.inventory import Found, discover
from ..folder.templates import has_template
from ..progress import progress_bar, say
from ..wording import curl
from .command import command_line, find_vllm, has_gpu, serve_options, shell, values_of
from .convert import vllm_adapter, vllm_adapter_path
from .fleet import CLASSIFIES, POOLED, Fleet, Pool, plan_fleet, with_whole_layers
from .kept_names import KeptNames
from .plugin import live_environment
from .supervisor import Supervisor

# Neither vLLM nor the libraries under it report use; nothing is fetched that was not asked for.
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class _Start:
    """One start of vLLM: what it serves, and its command."""

    pool: Pool
    names: Sequence[str]
    words: Sequence[str]


def up(
    root: Path,
    *,
    base: str | None,
    host: str,
    port: int,
    api_key: str | None,
    memory: int | None,
    vllm: str | None,
    live: bool,
    keep: bool,
    dry_run: bool,
    more: Sequence[str],
) -> None:
    """Convert what is not converted, start vLLM and keep it running until told to stop. Each start
    serves what is in `root` then.

    `live`: what appears, changes or goes later is followed, by the resolver; it opens vLLM's
    endpoints that load adapters. `keep`: a run that can no longer be served goes on as it was.
    Raises `DoraExportError`.
    """
    program = ["vllm", "serve"] if dry_run and vllm is None else find_vllm(vllm)
    where = ["--host", host, "--port", str(port)]

    def start() -> _Start:
        found = discover(root, base)
        fleet = plan_fleet(found, memory)
        if len(fleet.pools) != 1:
            left_out(fleet.problems, found.warnings)
            raise _several(root, fleet)
        (pool,) = fleet.pools
        adapters, problems = {}, dict(fleet.problems)
        place = vllm_adapter_path if dry_run else vllm_adapter
        bases = values_of("--served-model-name", more) or [pool.name]
        called = _kept(root, found, pool, bases) if live and not dry_run else {}
        with progress_bar(len(pool.ranks), "adapters", "adapter") as advance:
            for name in pool.ranks:
                try:
                    adapters[called.get(name, name)] = place(found.members[name])
                except DoraExportError as error:
                    problems[name] = str(error)
                else:
                    say(visible(f"adapter {called.get(name, name)}"))
                advance(1)
        left_out(problems, found.warnings)
        if adapters:
            _check_slots(pool, more)
        options = serve_options(pool, adapters, has_gpu())
        if live:
            options["enable-lora"] = True
        words = command_line(options, program, [*where, *more])
        return _Start(pool, [*bases, *adapters], words)

    first = start()
    environment = dict(_QUIET)
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
    if live:
        environment |= live_environment(first.pool, str(root.absolute()), keep=keep)
    if dry_run:
        click.echo(shell(first.words))
        return
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log = private_cache() / "logs" / f"vllm-{port}.log"
    click.echo(f"log     {log}", err=True)
    report = _Report(url, first.pool, first.names, api_key is not None)

    def again() -> Sequence[str]:
        fresh = start()
        report.pool, report.names = fresh.pool, fresh.names
        return fresh.words

    Supervisor(first.words, environment, f"{url}/health", log, report, again=again).run()


def _kept(root: Path, found: Found, pool: Pool, bases: Sequence[str]) -> Mapping[str, str]:
    """Name of the plan → name by which whoever follows `root` knows the run: where a namesake went,
    the plan gives its name to the one that is left, and a server would answer with another run."""
    runs = {found.members[name].path: name for name in pool.ranks}
    kept = KeptNames(root.absolute()).of(root, runs, runs, bases)
    return {runs[path]: name for name, path in kept.items()}


def _check_slots(pool: Pool, more: Sequence[str]) -> None:
    """Refuse fewer slots than the adapters need: vLLM silently leaves out what has none."""
    named = values_of("--lora-target-modules", more)
    if named and (without := set(pool.target_modules) - with_whole_layers(named)):
        raise TargetError(
            "adapters here adapt modules without slots (--lora-target-modules after --)",
            found=", ".join(sorted(without)),
            remedy="leave the option out, or name these too",
        )


def _several(root: Path, fleet: Fleet) -> DoraExportError:
    if not fleet.pools:
        return MissingError(
            "nothing here can be served",
            file=root,
            found=None if fleet.problems else "no base, no run",
            remedy="see what is said above of each" if fleet.problems else "choose with `base`",
        )
    one_base = len({pool.base.path for pool in fleet.pools}) == 1
    return RunError(
        "one vLLM serves one base",
        file=root,
        found=", ".join(f"{pool.name} ({pool.task or 'task not known'})" for pool in fleet.pools),
        expected="one base, and runs of one task",
        remedy="put the runs of each task into a folder of their own"
        if one_base
        else "choose with `base`; see dora-serve plan",
    )


def _example(pool: Pool) -> tuple[str, dict[str, object]]:
    """Where the models of `pool` are asked first, and with what."""
    if pool.task == CLASSIFIES:
        return "/classify", {"input": "a good film"}
    if pool.task in POOLED:
        return "/v1/embeddings", {"input": "a good film"}
    if has_template(pool.base.path):
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    return "/v1/completions", {"prompt": "Hello"}


class _Report:
    """Tells what happens to the server: a line that counts in a terminal, else a line an event."""

    def __init__(self, url: str, pool: Pool, names: Sequence[str], key: bool) -> None:
        self._url, self._key = url, key
        self.pool, self.names = pool, names  # of the latest start
        self._counting = False

    def __call__(self, event: str, seconds: float) -> None:
        if event == "starting":
            if sys.stderr.isatty():
                click.echo(f"\rstarting vLLM  {seconds:.0f} s", nl=False, err=True)
                self._counting = True
            return
        if self._counting:
            click.echo("", err=True)
            self._counting = False
        if event == "ready":
            click.echo(f"ready after {seconds:.0f} s")
            for name in self.names:
                click.echo(f"  {visible(name)}")
            path, example = _example(self.pool)
            click.echo(curl(self._url + path, {"model": self.names[-1], **example}, self._key))
            sys.stdout.flush()
        elif event == "crashed":
            click.secho(f"vLLM ended; again in {seconds:.0f} s", fg="red", err=True)
        else:
            click.echo("stopping", err=True)
