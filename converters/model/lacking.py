"""What a merged model would lack: transformers begins it anew whenever it loads the model."""

from __future__ import annotations

import re
from collections.abc import Set

from ..errors import BaseError, some
from .base import BaseModel
from .names import Names, unwrapped
from .tying import aliases


def check_whole(names: Names, written: Set[str], base: BaseModel) -> tuple[str, ...]:
    """A warning about parameters of the class of `names` that none of `written`, tensors on disk,
    becomes. Some that only training uses are left out by whoever made a base.

    Raises `BaseError` where transformers finds none, since a wrapper's prefix is in their names.
    """
    try:
        model = names.model
    except BaseError:  # transformers makes no model of the configuration
        model = None
    if model is None:
        return ()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = aliases(model)
    held = {own.get(name, name) for name in parameters if name in written}
    if len(held) < len({own.get(name, name) for name in parameters}):
        targets = {p: e.target_patterns for e in names.conversions[1] for p in e.source_patterns}
        for name in written - held:
            found, pattern = names.rename(name)
            first, *others = targets.get(pattern, ("",))
            held |= {own.get(n, n) for n in (found, *(found.replace(first, o) for o in others))}
    hidden = sorted(name for name in written if unwrapped(name) in parameters)
    if hidden and not held.intersection(parameters):
        raise BaseError(
            f"transformers finds no tensor of {names.architecture} in this base: their names have "
            "the prefix of a wrapper",
            file=base.path,
            tensor=hidden[0],
            expected=unwrapped(hidden[0]),
            remedy="save it again from the model itself (transformers: save_pretrained)",
        )
    unread = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    lacking = [
        name
        for name in parameters
        if own.get(name, name) not in held
        and ".pooler." not in f".{name}"
        and not any(pattern.search(name) for pattern in unread)
    ]
    if not lacking:
        return ()
    return (
        f"neither the base nor the run holds these parameters of {names.architecture}, which "
        f"transformers begins anew, most of them at random, at every load: {some(lacking)}",
    )
