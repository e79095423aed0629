"""Which base a run belongs to: by the weights it carries, by the name it gives, by its shapes.

A run that names a base is never paired with another one, unless the user says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from converters.errors import BaseError, DoraExportError, MissingError
from converters.files.handles import there
from converters.model.base import BaseModel, open_base
from converters.model.match import check_frozen, check_names
from converters.model.quantized import method
from converters.run import Run

from ..wording import quoted
from .names import own_name

# What people call quantized models, in the last part of a name.
_QUANTIZED = re.compile(
    r"(?i)(?<![a-z0-9])(bnb|[48]bit|(int|nf|fp|nvfp|mxfp)[48]|gptq|awq|w[48]a(4|8|16))(?![a-z0-9])"
)
_MEASURED = 8  # modules, of which the difference of two bases is measured
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def base_of(run: Run, bases: Sequence[BaseModel]) -> BaseModel:
    """The one of `bases` that `run` was trained on: the one whose weights its checkpoint carries,
    else the one it names or a copy of that (also by a hub id, from the local cache), else, where it
    names none, the only one whose matrices have the shapes of its updates.

    Raises `BaseError` when that is none or several.
    """
    fitting = [base for base in bases if fits(run, base)]
    named: list[BaseModel] = []
    for meant in (is_named, is_copy):
        named = named or [base for base in fitting if run.base and meant(run.base, base)]
    if len(named) == 1:
        return named[0]
    if len(fitting) == 1 and (run.base is None or run.embedded_base is not None):
        return fitting[0]
    if not named and run.base is not None and _is_hub_id(run.base):
        with suppress(MissingError):
            cached = open_base(run.base, run.revision)
            if fits(run, cached):
                return cached
    names = ", ".join(own_name(base.path) for base in fitting)
    count = f"{len(fitting)} bases fit" if len(fitting) > 1 else "one base fits"
    none = f"no base that fits among {len(bases)}" if bases else "no base lies here"
    found = f"{count}: {names}" if fitting else none
    own = run.base is not None and not _is_hub_id(run.base) and there(Path(run.base))
    likely = fitting[0].path if fitting else run.base if own else None
    one = "--base" if likely is None else f"--base {quoted(likely)} if that is the right one"
    raise BaseError(
        "the run's base is not known",
        file=run.path,
        found=found if run.base is None else f"{found}; the run names {run.base}",
        remedy=f"put the base that it names into the folder, or pass {one}",
    )


def is_named(wanted: str, base: BaseModel) -> bool:
    """Whether `base` is what `wanted`, a folder or a hub id in a run's configuration, names.

    A folder that is there settles it; every byte of the weights tells a namesake from a copy of it.
    Of one that is elsewhere only the name is known.
    """
    path = Path(wanted)
    here = there(path) and path.is_dir()
    if here and path.resolve() == base.path.resolve():
        return True
    known = wanted if not here and _is_hub_id(wanted) else own_name(path)
    own = own_name(base.path)
    if not ("/" in known and "/" in own):
        known, own = Path(known).name, Path(own).name
    return known == own and not (here and _differs(path, base))


def is_copy(wanted: str, base: BaseModel) -> bool:
    """Whether `wanted` is a folder that is there, and `base` its copy, whatever it is called."""
    path = Path(wanted)
    return there(path) and path.is_dir() and _differs(path, base) is False


def told(run: Run, base: BaseModel) -> Run:
    """`run` for `base`, which the user gave: with a warning where it names another one."""
    if run.base is None or run.embedded_base is not None:
        return run
    wanted = f"{run.base}, revision {run.revision}," if _is_older(run, base) else run.base
    if wanted == run.base and is_named(run.base, base):
        return run
    warning = f"the run names {wanted} as its base; it goes with {base.name}, as was asked for"
    if base.stored is None and not base.packed:
        warning += _quantized_named(run, base)
    else:
        warning += "; that is quantized: as in training, nothing here tells"
    return replace(run, warnings=tuple(dict.fromkeys((*run.warnings, warning))))


def _is_older(run: Run, base: BaseModel) -> bool:
    """Whether `base` is the hub's model that `run` names, in another state of it."""
    known = (None, base.revision or "main", base.path.name)
    return run.base == base.name and run.revision not in known


@contextmanager
def naming(run: Run, base: BaseModel) -> Iterator[None]:
    """Let a `BaseError` raised within point to the base that `run` names, where that is another
    one than `base`, which the user gave."""
    try:
        yield
    except BaseError as error:
        if run.base is not None and not is_named(run.base, base):
            error.remedy = f"the run names {run.base} as its base: pass that one with `base`"
        raise


def _quantized_named(run: Run, base: BaseModel) -> str:
    """What is to be said where the base that `run` names is quantized, and `base` is not."""
    named, other = str(run.base), None
    with suppress(DoraExportError):
        if there(Path(named)) or _is_hub_id(named):
            other = open_base(named, run.revision)
    if (other is None and not _QUANTIZED.search(Path(named).name)) or (
        other is not None and method(other.config) is None
    ):
        return ""
    said = (
        "; that base is quantized, and what was trained is its dequantized weights with the update "
        "on them: on this one it is another model, if a close one"
    )
    if other is None or other.stored is None:
        return said
    own, theirs = 0.0, 0.0
    modules = list(run.updates)
    for module in modules[:: max(1, len(modules) // _MEASURED)]:
        weight, packed = base.weight(module), other.weight(module)
        if weight is not None and packed is not None and weight.shape == packed.shape:
            plain = weight.load().double()
            own += float(plain.square().sum())
            theirs += float((packed.load().double() - plain).square().sum())
    return said + (f" (its weights are {(theirs / own) ** 0.5:.1%} apart)" if own else "")


def fits(run: Run, base: BaseModel) -> bool:
    """Whether `base` has every matrix that `run` updates, in its shape, and the frozen weights that
    a checkpoint carries."""
    try:
        check_fits(run, base)
    except BaseError:
        return False
    return True


def check_fits(run: Run, base: BaseModel) -> None:
    """Raise `BaseError` when a matrix that `run` updates is not in `base`, or of another shape, or
    a checkpoint carries another base's frozen weights.

    Frozen weights are compared whole, at the coarser of both dtypes: a training in float32 on a
    base in bfloat16 is of that base.
    """
    if run.embedded_base is None:
        check_names(run, base)
        return
    for module in run.updates:
        if f"{module}.weight" not in run.embedded_base or base.weight(module) is None:
            raise BaseError(
                "the base has no such module", file=base.path, tensor=f"{module}.weight"
            )
    check_frozen(run, base)


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not there(Path(name))


def _differs(path: Path, base: BaseModel) -> bool | None:
    """Whether the model at `path` is another than `base`; None where it cannot be read."""
    try:
        other = open_base(path)
    except DoraExportError:
        return None
    if {n: (t.dtype, t.shape) for n, t in other.tensors.items()} != {
        n: (t.dtype, t.shape) for n, t in base.tensors.items()
    }:
        return True  # without reading either
    return other.fingerprint != base.fingerprint
