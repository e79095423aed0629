"""Writing a merged model's folder: shards, index, configuration, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...certificate import write_json
from ...files.leftovers import JOURNAL
from ...progress import Progress
from ...run import NO_UPDATE
from ..target import Report
from .journal import Journal
from .stream import Rounding, write_shards

if TYPE_CHECKING:
    from .plan import MergePlan

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"  # a file of any other name is found by the index

# Above this share of an update lost to rounding the user is warned.
LOSS_WARNING = 0.05


@dataclass(frozen=True)
class MergeReport(Report):
    """`rounding`: per module, what survived the output dtype. `resumed`: the shards that a killed
    merge had finished."""

    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    resumed: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        lost = {module: report.lost for module, report in self.rounding.items()}
        again = _requantized(self.rounding)
        told = {} if again is None else {"requantized": again}
        return {"lost_to_rounding": lost, "resumed": list(self.resumed), **told}

    def lines(self) -> list[str]:
        said = []
        if self.resumed:
            said.append(f"{len(self.resumed)} shard(s) are of a killed merge")
        if self.rounding:
            most = max(report.lost for report in self.rounding.values())
            said.append(f"rounding changed a module's update by at most {most:.2%}")
        if (again := _requantized(self.rounding)) is not None:
            said.append(
                f"{again['tensors']} weights are in float8 again, {again['mean_error']:.1e} on "
                f"average and {again['max_error']:.1e} at most from the merged ones"
            )
        return said


def write_folder(folder: Path, plan: MergePlan, progress: Progress) -> MergeReport:
    """Fill `folder` as planned."""
    journal = Journal(folder, plan) if (folder / JOURNAL).exists() else None
    rounding = _write_shards(folder, plan, progress, journal)
    _write_index(folder, plan)
    write_json(folder / "config.json", plan.config)
    plan.companions.copy(folder)
    modules = {
        module: {
            "start_rank": plan.run.start_rank.get(module),
            "rank": rank,
            "relative_update": rounding[module].relative_update,
            "rounding": {
                "cosine": rounding[module].cosine,
                "norm_ratio": rounding[module].norm_ratio,
                "lost": rounding[module].lost,
            },
        }
        for module, rank in plan.ranks.items()
    }
    written = {id(tensor.source) for tensor in plan.tensors}
    details = {
        "dtype": None if plan.dtype is None else str(plan.dtype).removeprefix("torch."),
        **({} if plan.dequantized is None else {"dequantized": plan.dequantized}),
        **({} if (again := _requantized(rounding)) is None else {"requantized": again}),
        "replaced": sorted(n for n, t in plan.run.replaced.items() if id(t) in written),
    }
    notes, resumed = ((), ()) if journal is None else (journal.notes, tuple(journal.finished))
    updated = any(report.relative_update for report in rounding.values())
    zero = (NO_UPDATE,) if plan.ranks and not updated else ()
    warnings = (*zero, *_loss_warnings(rounding), *notes)
    return MergeReport(modules, details, warnings, rounding, resumed)


def _requantized(rounding: Mapping[str, Rounding]) -> dict[str, float] | None:
    """What it cost to quantize weights again; None where none were."""
    again = [report for report in rounding.values() if report.count]
    if not again:
        return None
    count = sum(report.count for report in again)
    return {
        "tensors": len(again),
        "mean_error": sum(report.error for report in again) / count,
        "max_error": max(report.largest for report in again),
    }


def _write_shards(
    folder: Path, plan: MergePlan, advance: Progress, journal: Journal | None
) -> dict[str, Rounding]:
    """Write the shards, but those that the journal knows to be whole."""
    hashes = plan.base.hashes  # which the certificate will ask for
    if journal is None:
        return write_shards(folder, plan.shards, plan.run, advance, hashes=hashes)
    done = journal.finished
    advance(sum(t.nbytes for name in done for t in plan.shards[name]))
    left = {name: tensors for name, tensors in plan.shards.items() if name not in done}
    rounding = write_shards(folder, left, plan.run, advance, journal.add, hashes)
    return {**rounding, **{m: report for shard in done.values() for m, report in shard.items()}}


def _write_index(folder: Path, plan: MergePlan) -> None:
    if list(plan.shards) != [_SINGLE]:
        files = {t.name: name for name, tensors in plan.shards.items() for t in tensors}
        write_json(folder / _INDEX, {"metadata": {"total_size": plan.nbytes}, "weight_map": files})


def _loss_warnings(rounding: dict[str, Rounding]) -> list[str]:
    lossy = {
        module: report.lost for module, report in rounding.items() if report.lost > LOSS_WARNING
    }
    if not lossy:
        return []
    worst = max(lossy, key=lambda module: lossy[module])
    return [
        f"rounding to the output dtype moved the weights of {len(lossy)} of {len(rounding)} "
        f"modules more than {LOSS_WARNING:.0%} as far as their updates (worst: {worst}, "
        f"{lossy[worst]:.0%}); "
        "use `dtype` float32, or deploy an adapter"
    ]
