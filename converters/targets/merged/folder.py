"""The merged model: a Hugging Face folder that `from_pretrained` loads, with the base's shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ...certificate import FILE, certificate, write_certificate, write_json
from ...errors import BaseError
from ...files.output import check_output, output_folder
from ...model.base import BaseModel
from ...run import Run
from .journal import Journal
from .plan import MergePlan, plan_merge
from .stream import Progress, Rounding, write_shards

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe"}
_OWN_FILES = {"config.json", "adapter_config.json", FILE}
# What `save_pretrained` of a tokenizer writes, of any kind.
_TOKENIZER = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("source.spm", "target.spm", "bpe.codes"),
}
_INDEX = "model.safetensors.index.json"

# Above this share of an update lost to rounding the user is warned.
LOSS_WARNING = 0.05


@dataclass(frozen=True)
class MergeResult:
    """What was written. `rounding`: per module, what survived the output dtype. `resumed`: the
    shards that a killed merge had finished."""

    path: Path
    plan: MergePlan
    rounding: dict[str, Rounding]
    warnings: tuple[str, ...]
    resumed: tuple[str, ...] = ()


def write_merged(
    run: Run,
    base: BaseModel,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[int], AbstractContextManager[Progress]] | None = None,
) -> MergeResult:
    """Merge `run` into `base` and write the result to the folder `target`.

    Memory: one block of rows per thread and the components of one module, never a whole matrix.
    `dtype` None keeps each tensor's dtype; `progress` opens a bar for a number of bytes. With
    `resume`, a merge that is killed leaves its finished shards for the next with `resume`, which
    checks every byte of them by hash. Raises `DoraExportError`, with nothing written, when the run
    does not fit the base or the output cannot be written.
    """
    check_output(target, force, [run.path, base.path])
    stripped = run.strip()
    plan = plan_merge(stripped, base, dtype)
    check_output(target, force, [run.path, base.path], plan.nbytes, resume)
    bar = progress(plan.nbytes) if progress is not None else nullcontext(_no_progress)
    with output_folder(target, resume) as folder, bar as advance:
        journal = Journal(folder, plan) if resume else None
        rounding = _write_shards(folder, plan, base, advance, journal)
        _write_index(folder, plan)
        write_json(folder / "config.json", plan.config)
        copy_companions(base.path, folder, run.path)
        warnings = (*run.warnings, *_loss_warnings(rounding))
        proof = _certificate(plan.run, base, plan, rounding, dtype)
        # Hashing every byte would cost half as much again as the merge.
        write_certificate(folder, proof, pieces=True)
    if journal is None:
        return MergeResult(target, plan, rounding, warnings)
    return MergeResult(target, plan, rounding, (*warnings, *journal.notes), tuple(journal.finished))


def _write_shards(
    folder: Path, plan: MergePlan, base: BaseModel, advance: Progress, journal: Journal | None
) -> dict[str, Rounding]:
    """Write the shards, but those that the journal knows to be whole."""
    if journal is None:
        return write_shards(folder, plan.shards, plan.run, advance, hashes=base.hashes)
    done = journal.finished
    advance(sum(t.nbytes for name in done for t in plan.shards[name]))
    left = {name: tensors for name, tensors in plan.shards.items() if name not in done}
    rounding = write_shards(folder, left, plan.run, advance, journal.add, base.hashes)
    return {**rounding, **{m: report for shard in done.values() for m, report in shard.items()}}


def _no_progress(_bytes: int) -> None:
    """Nobody is watching."""


def _write_index(folder: Path, plan: MergePlan) -> None:
    if len(plan.shards) > 1:
        files = {t.name: name for name, tensors in plan.shards.items() for t in tensors}
        write_json(folder / _INDEX, {"metadata": {"total_size": plan.nbytes}, "weight_map": files})


def copy_companions(source: Path, folder: Path, run: Path | None = None) -> None:
    """Tokenizer, generation configuration and the like of the base in `source`; weights and code
    stay behind. A tokenizer that was saved with the run takes the place of the base's: tokens may
    have been added, and the chat template is the one of the training."""
    own = run is not None and (run / "tokenizer_config.json").is_file()
    for path in source.iterdir():
        known = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
        left = path.name in _OWN_FILES or path.name.endswith(".index.json")
        if path.is_file() and known and not left and not (own and path.name in _TOKENIZER):
            _copy(path, source, folder)
    if run is not None and own:
        for name in sorted(_TOKENIZER):
            if (run / name).is_file():
                _copy(run / name, run, folder)


def _copy(path: Path, source: Path, folder: Path) -> None:
    _check_inside(path, source)
    shutil.copyfile(path, folder / path.name)


def _check_inside(path: Path, source: Path) -> None:
    """Raise `BaseError` for a link out of the folder, whose content nobody meant to pass on; the
    links of a hub cache's snapshot lead to its blobs."""
    own = source.resolve()
    blobs = own.parent.parent / "blobs"
    real = path.resolve()
    if not real.is_relative_to(own) and not (
        own.parent.name == "snapshots" and blobs in real.parents
    ):
        raise BaseError(
            "a file to be copied is a link out of its folder",
            file=path,
            found=real,
            remedy="copy the file into the folder, if it is meant",
        )


def _loss_warnings(rounding: dict[str, Rounding]) -> list[str]:
    lossy = {
        module: report.lost for module, report in rounding.items() if report.lost > LOSS_WARNING
    }
    if not lossy:
        return []
    worst = max(lossy, key=lambda module: lossy[module])
    return [
        f"rounding to the output dtype lost more than {LOSS_WARNING:.0%} of the update in "
        f"{len(lossy)} of {len(rounding)} modules (worst: {worst}, {lossy[worst]:.0%}); "
        "use `dtype` float32, or deploy an adapter"
    ]


def _certificate(
    run: Run,
    base: BaseModel,
    plan: MergePlan,
    rounding: dict[str, Rounding],
    dtype: torch.dtype | None,
) -> dict[str, object]:
    modules = {
        module: {
            "start_rank": run.start_rank.get(module),
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
    return certificate(
        "merged",
        run,
        base,
        modules,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        replaced=sorted(t.name for t in plan.tensors if t.name in run.replaced),
    )
