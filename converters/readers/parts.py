"""Runs stored in parts, as of DLoRA, which trains modules in the cloud and on devices (Gao and
Zhang 2024, arXiv 2404.05182).

Each part is a run of its own: a folder, or an adapter file beside the adapter_config.json that
also holds for it. Together they adapt what any of them adapts.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import MissingError, RunError
from ..files.tensors import LazyTensor
from ..options import ReadOptions
from ..run import LazyUpdates, Run
from .registry import detect
from .run_folder import CONFIG_FILE, RunFolder

T = TypeVar("T")


def read_parts(first: Run, options: ReadOptions) -> Run:
    """`first` and the parts that `options` names as one run.

    Raises `RunError` when parts do not belong together: other bases or tasks, or the same module
    with different tensors.
    """
    alone = replace(options, parts=())
    run = first
    for path in options.parts:
        run = _join(run, _read(path, alone))
    return run


def _read(path: Path, options: ReadOptions) -> Run:
    if not path.exists():
        raise MissingError("no such part of the run", file=path, remedy="correct `part`")
    file = path.is_file()
    if file and not (path.parent / CONFIG_FILE).is_file():
        raise RunError(
            "a part that is a file needs the configuration of its adapter",
            file=path,
            expected=f"{CONFIG_FILE} beside it",
            remedy="copy it there from the first part, or give a folder as `part`",
        )
    reader, folder = detect(path.parent if file else path, options.method)
    folder = RunFolder(path.parent, path) if file else folder
    run = replace(reader.read(folder, options), method=reader.name)
    run = replace(run, path=path) if file else run
    if not run.updates and not run.replaced:
        raise RunError("this part of the run adapted nothing", file=path)
    return run


def _join(left: Run, right: Run) -> Run:
    for run in (left, right):
        if run.embedded_base is not None:
            raise RunError(
                "a checkpoint with a whole model in it is no part of a run",
                file=run.path,
                expected="adapters",
                remedy="read it alone, without `part`",
            )
    owner = {module: run for run in (left, right) for module in run.updates}
    loaders = {m: partial(run.take, m) for m, run in owner.items()}
    shapes = {module: run.shapes[module] for module, run in owner.items()}
    for module in left.updates.keys() & right.updates.keys():
        if not _same(left.updates[module], right.updates[module]):
            raise _conflict(
                "the same module is in two parts, with different tensors", module, right
            )
    for name in left.replaced.keys() & right.replaced.keys():
        if not _same_tensor(left.replaced[name], right.replaced[name]):
            raise _conflict("a tensor is in two parts, with different values", name, right)
    for one, other in ((left, right), (right, left)):
        for name in other.replaced:
            if name in one.updates or name.removesuffix(".weight") in one.updates:
                raise _conflict("one part adapts what another replaces", name, right)
    return replace(
        left,
        method=" + ".join(dict.fromkeys([*left.method.split(" + "), right.method])),
        updates=LazyUpdates(loaders, shapes),
        replaced={**left.replaced, **right.replaced},
        base=_agreed("base model", left.base, right.base, right),
        revision=_agreed("state of the base model", left.revision, right.revision, right),
        task=_agreed("task", left.task, right.task, right),
        num_labels=_agreed("number of labels", left.num_labels, right.num_labels, right),
        finished=left.finished and right.finished,
        start_rank={**left.start_rank, **right.start_rank},
        embeddings=left.embeddings | right.embeddings,
        tied=left.tied | right.tied,
        kernels={**left.kernels, **right.kernels},
        apart=left.apart | right.apart,
        files=tuple(dict.fromkeys((*left.files, *right.files))),
        options={**left.options, **right.options},
        warnings=tuple(dict.fromkeys((*left.warnings, *right.warnings))),
    )


def _agreed(what: str, left: T | None, right: T | None, part: Run) -> T | None:
    """What both parts say, or the only one that says anything."""
    if left is not None and right is not None and left != right:
        raise RunError(
            f"the parts are not of one run: another {what}",
            file=part.path,
            found=right,
            expected=left,
        )
    return right if left is None else left


def _same(left: object, right: object) -> bool:
    """Whether two updates (or what they hold) are of one kind with equal tensors."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if type(left) is not type(right) or not is_dataclass(left):
        return left == right
    names = [field.name for field in fields(left)]
    return all(_same(getattr(left, name), getattr(right, name)) for name in names)


def _same_tensor(left: LazyTensor, right: LazyTensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.load(), right.load())


def _conflict(message: str, name: str, part: Run) -> RunError:
    return RunError(
        message, file=part.path, tensor=name, remedy="leave out the part that is not current"
    )
