"""A fleet for people and machines: table, picture, JSON."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from unicodedata import category, east_asian_width

import click

from converters.errors import some, visible
from converters.fit import percent

from ..commands.common import size
from ..rankmap.output import write_file
from ..rankmap.palette import EMPTY, FULL
from ..rankmap.picture import drawn
from ..wording import alike
from .fleet import Fleet, Pool, step_for


def as_json(fleet: Fleet) -> dict[str, object]:
    return {"pools": [_pool(pool) for pool in fleet.pools], "problems": dict(fleet.problems)}


def _pool(pool: Pool) -> dict[str, object]:
    return {
        "name": pool.name,
        "base": str(pool.base.path),
        "task": pool.task,
        "adapters": {
            name: {
                "largest_rank": pool.largest[name],
                "ranks": dict(ranks),
                "bytes_used": pool.used[name],
            }
            for name, ranks in pool.ranks.items()
        },
        "max_lora_rank": pool.max_lora_rank,
        "max_loras": pool.max_loras,
        "max_cpu_loras": pool.max_cpu_loras,
        "lora_target_modules": pool.target_modules,
        "base_bytes": pool.base_bytes,
        "slot_bytes": pool.slot,
        "slots_bytes": pool.slot * pool.max_loras,
        "padding": pool.padding,
        "naive_slot_bytes": pool.naive_slot,
        "fits": pool.fits,
        "forced": [vars(forced) for forced in pool.forced],
        "split": pool.split,
        "advice": pool.advice,
    }


def table(fleet: Fleet) -> Iterator[str]:
    """The lines of the plan."""
    for pool in fleet.pools:
        yield click.style(pool.name, bold=True) + (
            f"  {pool.task or 'task not known'}, {size(pool.base_bytes)}"
        )
        if not pool.ranks:
            yield "  no adapters"
            continue
        width = max(cells(visible(name)) for name in ("adapter", *pool.ranks))
        yield f"  {'adapter':<{width}}  modules  largest rank      used  of its slot"
        for name, ranks in pool.ranks.items():
            share = pool.used[name] / pool.slot if pool.slot else 0.0
            yield (
                f"  {visible(name)}{' ' * (width - cells(visible(name)))}  {len(ranks):>7}"
                f"  {pool.largest[name]:>12}"
                f"  {size(pool.used[name]):>8}  {share:>11.0%}"
            )
        yield from _settings(pool)
    for names, (first, *rest) in alike(fleet.problems):
        yield click.style(f"left out: {names}", fg="yellow") + f": {first}"
        yield from rest
    if fleet.problems:
        planned = sum(len(pool.ranks) for pool in fleet.pools)
        yield (
            f"{planned} {'adapter' if planned == 1 else 'adapters'} planned, "
            f"{len(fleet.problems)} left out"
        )


def _settings(pool: Pool) -> Iterator[str]:
    slots = pool.slot * pool.max_loras
    yield f"  --max-lora-rank {pool.max_lora_rank}, the smallest that holds them"
    yield (
        f"  --max-loras {pool.max_loras}: so many may be in one batch; "
        f"--max-cpu-loras {pool.max_cpu_loras}: so many stay in memory"
    )
    yield f"  --lora-target-modules {' '.join(pool.target_modules) or '(none left)'}"
    yield (
        f"  a slot takes {size(pool.slot)}, {pool.max_loras} slots {size(slots)}; "
        f"on average {pool.padding:.0%} of a slot is padding"
    )
    if pool.slot and pool.naive_slot > 1.05 * pool.slot:
        naive = step_for(pool.start_rank)
        began = f"for the ranks that training began with (--max-lora-rank {naive}), "
        yield (
            f"  {began if naive > pool.max_lora_rank else ''}without --lora-target-modules: "
            f"{size(pool.naive_slot)} a slot, {pool.naive_slot / pool.slot:.1f} times as much"
        )
    if not pool.fits:
        yield click.style("  does not fit into the memory given", fg="red")
    if pool.forced:
        names = some(f"{visible(each.name)} (rank {each.rank})" for each in pool.forced)
        needs = "needs" if len(pool.forced) == 1 else "need"
        errors = sorted({percent(f(each.error for each in pool.forced)) for f in (min, max)})
        below = pool.forced[0].step
        yield f"  only {names} {needs} --max-lora-rank {pool.max_lora_rank}: fitted to rank {below}"
        yield (
            f"    (dora-export adapter RUN OUT --max-rank {below}) an update is off by "
            f"{' to '.join(errors)}"
        )
    if pool.split:
        steps = "; ".join(f"{step}: {', '.join(names)}" for step, names in pool.split.items())
        yield f"  a server for each step, each with the base, takes less memory: {steps}"
    yield f"  {pool.advice}"


def cells(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    return sum(
        0 if category(c) in ("Mn", "Me", "Cf") else 2 if east_asian_width(c) in "WF" else 1
        for c in text
    )


def save_png(fleet: Fleet, path: Path, force: bool = False) -> None:
    """Per pool, what of every adapter's slot is used (needs matplotlib). Raises `OutputError` as
    `write_file`."""
    from matplotlib.figure import Figure

    pools = [pool for pool in fleet.pools if pool.ranks]
    rows = sum(len(pool.ranks) for pool in pools)
    figure = Figure(figsize=(8, 1.2 * len(pools) + 0.35 * rows + 0.7), layout="constrained")
    heights = [len(pool.ranks) + 1 for pool in pools]
    panels = figure.subplots(len(pools), 1, squeeze=False, height_ratios=heights)
    for (panel,), pool in zip(panels, pools, strict=True):
        at = range(len(pool.ranks))
        used = [pool.used[name] / 1e6 for name in pool.ranks]
        room = [pool.slot / 1e6] * len(used)
        bars = [
            panel.barh(at, room, color=EMPTY, edgecolor=FULL, linewidth=0.5, label="padding"),
            panel.barh(at, used, color=FULL, label="the adapter's own numbers"),
        ]
        shares = [
            f"{pool.used[n] / pool.slot:.0%}, rank {pool.largest[n]}" if pool.slot else ""
            for n in pool.ranks
        ]
        panel.bar_label(bars[0], shares, padding=4, fontsize=8)
        panel.margins(x=0.22, y=0.01)
        panel.set_yticks(at, [drawn(name) for name in pool.ranks])
        panel.invert_yaxis()
        panel.set_xlabel("megabytes of the slot that vLLM keeps for each adapter")
        panel.spines[["top", "right"]].set_visible(False)
        title = f"{drawn(pool.name)}, --max-lora-rank {pool.max_lora_rank}"
        panel.set_title(f"{title}: {pool.padding:.0%} of the slots is padding", fontsize=10)
    figure.legend(handles=bars, loc="outside lower right", ncols=2, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    write_file(path, data.getvalue(), force)
