"""Which base a run belongs to: by the weights it carries, by the name it gives, by its shapes.

A run that names a base is never paired with another one, unless the user says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from converters.errors import BaseError, DoraExportError, MissingError
from converters.files.handles import there
from converters.model.base import BaseModel, fingerprint, open_base
from converters.model.match import check_fits
from converters.run import Run

from .names import own_name

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def base_of(run: Run, bases: Sequence[BaseModel]) -> BaseModel:
    """The one of `bases` that `run` was trained on: the one whose weights its checkpoint carries,
    else the one it names (also by a hub id, from the local cache), else, where it names none, the
    only one whose matrices have the shapes of its updates.

    Raises `BaseError` when that is none or several.
    """
    fitting = [base for base in bases if fits(run, base)]
    named = [base for base in fitting if run.base is not None and is_named(run.base, base)]
    if len(named) == 1:
        return named[0]
    if len(fitting) == 1 and (run.base is None or run.embedded_base is not None):
        return fitting[0]
    if not named and run.base is not None and _is_hub_id(run.base):
        with suppress(MissingError):
            cached = open_base(run.base)
            if fits(run, cached):
                return cached
    found = f"{len(fitting)} bases that fit: {', '.join(own_name(base.path) for base in fitting)}"
    if not fitting:
        found = f"no base that fits among {len(bases)}"
    raise BaseError(
        "the run's base is not known",
        file=run.path,
        found=found if run.base is None else f"{found}; the run names {run.base}",
        remedy="put the base that it names into the folder, or pass --base",
    )


def is_named(wanted: str, base: BaseModel) -> bool:
    """Whether `base` is what `wanted`, a folder or a hub id in a run's configuration, names.

    A folder that is there settles it; samples of the weights tell a namesake from a copy of it.
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


def other_name(run: Run, base: BaseModel) -> str | None:
    """A warning where `run` names another base than `base`, which the user gave."""
    if run.base is None or run.embedded_base is not None or is_named(run.base, base):
        return None
    return f"the run names {run.base} as its base; it goes with {base.name}, as was asked for"


def fits(run: Run, base: BaseModel) -> bool:
    """Whether `base` has every matrix that `run` updates, in its shape, and the frozen weights that
    a checkpoint carries."""
    if run.embedded_base is not None:
        for module in run.updates:
            own, weight = run.embedded_base.get(f"{module}.weight"), base.weight(module)
            if own is None or weight is None or fingerprint(own) != fingerprint(weight):
                return False
        return True
    try:
        check_fits(run, base)
    except BaseError:
        return False
    return True


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not there(Path(name))


def _differs(path: Path, base: BaseModel) -> bool:
    """Whether the model at `path` surely is another than `base`."""
    try:
        other = open_base(path).tensors
    except DoraExportError:
        return False
    return other.keys() != base.tensors.keys() or any(
        fingerprint(tensor) != fingerprint(base.tensors[name]) for name, tensor in other.items()
    )
