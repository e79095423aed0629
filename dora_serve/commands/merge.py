"""`dora-export merge RUN OUT`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from . import common


@click.command("merge")
@common.run_argument
@click.argument("out", type=common.OUTPUT)
@common.base_option
@click.option(
    "--dtype", type=click.Choice(common.DTYPES), help="Output dtype; default: the base's."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue a merge that was killed; if this one is, keep what it finished.",
)
@common.dry_run_option
@common.force_option
@common.json_option
@common.reports_errors
def command(
    run: Path,
    out: Path,
    base: str | None,
    dtype: str | None,
    resume: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge RUN into its base model and write the Hugging Face folder OUT.

    OUT has the base's shards, dtype, configuration and tokenizer, loads with
    AutoModel…from_pretrained, and appears whole or not at all. With --resume, the finished shards
    of a merge that was killed stay in a hidden folder beside OUT; the same command again checks
    them by hash, makes the others, and OUT is as if nothing had happened.
    """
    from converters.files.output import check_output
    from converters.targets.merged.folder import write_merged
    from converters.targets.merged.plan import plan_merge
    from dora_serve.api import find_base

    loaded = common.load_run(run, base, **options)
    model = find_base(loaded, base)
    torch_dtype = common.torch_dtype(dtype)
    if dry_run:
        plan = plan_merge(loaded.strip(), model, torch_dtype)
        check_output(out, force, [loaded.path, model.path], plan.nbytes, resume)
        merged = [t.name for t in plan.tensors if t.module]
        summary = {
            "output": str(out),
            "bytes": plan.nbytes,
            "shards": {name: len(tensors) for name, tensors in plan.shards.items()},
            "merged": merged,
            "copied": sum(t.is_copy for t in plan.tensors),
        }
        if as_json:
            common.print_json(summary)
        else:
            click.echo(
                f"would write {out}: {len(plan.tensors)} tensors in {len(plan.shards)} shard(s), "
                f"{common.size(plan.nbytes)}; {len(merged)} of them change"
            )
        common.warn(loaded.warnings)
        return

    result = write_merged(
        loaded,
        model,
        out,
        dtype=torch_dtype,
        force=force,
        resume=resume,
        progress=partial(common.progress_bar, text="merging"),
    )
    ranks = result.plan.ranks
    start = loaded.start_rank
    kept = sum(start.get(name, 0) if rank is None else rank for name, rank in ranks.items())
    started = sum(loaded.start_rank.values())
    if as_json:
        common.print_json(
            {
                "output": str(out),
                "bytes": result.plan.nbytes,
                "method": loaded.method,
                "finished": loaded.finished,
                "modules": len(ranks),
                "components": {"start": started, "kept": kept},
                "lost_to_rounding": {m: r.lost for m, r in result.rounding.items()},
                "resumed": list(result.resumed),
                "warnings": list(result.warnings),
            }
        )
    else:
        click.echo(
            f"{out}: merged {len(ranks)} modules ({kept} of {started} components "
            f"survived training), {common.size(result.plan.nbytes)}"
        )
        if result.resumed:
            click.echo(
                f"  {len(result.resumed)} of {len(result.plan.shards)} shards are of a killed merge"
            )
        if result.rounding:
            worst = max(result.rounding.values(), key=lambda report: report.lost)
            click.echo(f"  rounding took at most {worst.lost:.2%} of a module's update")
        click.echo(f"  check it: dora-export verify {run} {out} --base {model.name}")
    common.warn(result.warnings)
