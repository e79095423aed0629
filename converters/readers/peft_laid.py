"""Which way round PEFT laid the pairs for parameters of fused experts.

Of a parameter `[experts, x, y]` `lora_A` reads one axis and `lora_B` writes the other. Since 0.19.1
A reads what the class reads: y, or x where it `is_transposed` (huggingface/peft#3165). Until 0.18 A
read x in every class, and 0.19.0 had `is_transposed` the wrong way round. The shapes tell it, but
where x = y: there other pairs of the same run do, or the version that saved them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..model.base import open_base
from ..model.match import Classes, classes
from ..options import ReadOptions
from ..run import Run
from .peft_common import need_base

_TODAY = (0, 19, 1)


def turned(
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, int]],
    run: Run,
    file: Path,
    options: ReadOptions,
) -> frozenset[str]:
    """Of the parameters in `shapes`, `[rows of B, columns of A]`, those whose pairs lie the other
    way round than today's PEFT lays them.

    Without a base none is known to: what its shape can tell is told where the base is met.
    """
    version = _version(config)
    square = {name for name, (rows, columns) in shapes.items() if rows == columns}
    if options.base is None:
        if square and version < _TODAY:
            need_base(options, "which way round this version of PEFT laid a square pair", file)
        return frozenset()
    known = classes(run.task, run.num_labels, open_base(options.base))
    lying = {name: found for name in shapes if (found := _lies(known, name)) is not None}
    shown = {
        name
        for name, (x, y, transposed) in lying.items()
        if x != y and shapes[name] == ((x, y) if transposed else (y, x))
    }
    seen = bool(lying.keys() - square)
    return frozenset(
        name
        for name, (_, _, transposed) in lying.items()
        if name in shown or (name in square and (shown if seen else _swapped(version, transposed)))
    )


def experts_of(parameters: Iterable[str], run: Run, options: ReadOptions) -> dict[str, int]:
    """Of each of the parameters that the base has as a stack, how many experts are in it."""
    if options.base is None:
        return {}
    known = classes(run.task, run.num_labels, open_base(options.base))
    names = {parameter: known.tensor(parameter) for parameter in parameters}
    shapes = {p: known.whole.names.state.get(name or "", ()) for p, name in names.items()}
    return {parameter: shape[0] for parameter, shape in shapes.items() if len(shape) == 3}


def laid_otherwise(config: Mapping[str, object]) -> bool:
    """Whether today's PEFT may read the pairs of a run for experts otherwise than it was trained,
    which it does in silence where a parameter is square."""
    return bool(config.get("target_parameters")) and _version(config) < _TODAY


def _lies(known: Classes, parameter: str) -> tuple[int, int, bool] | None:
    """The axes x and y of a parameter of experts, and whether its class reads x."""
    name = known.tensor(parameter)
    full = known.whole.names.state.get(name, ()) if name is not None else ()
    if name is None or len(full) != 3:
        return None
    owner = known.whole.names.model.get_submodule(name.rpartition(".")[0])
    return full[1], full[2], bool(getattr(owner, "is_transposed", False))


def _swapped(version: tuple[int, ...], transposed: bool) -> bool:
    """Whether this version of PEFT laid a pair otherwise than today's for such a class."""
    return version < _TODAY and (version >= (0, 19) or not transposed)


def _version(config: Mapping[str, object]) -> tuple[int, ...]:
    """Of the PEFT that saved the run; today's where none is told, as by 0.17, which met no class
    that this changes, and by other programs."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version")))
    return tuple(map(int, found.groups())) if found is not None else _TODAY
