"""Updates of modules that are parts of tensors on disk, as updates of these tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import BaseError
from ..run import Run
from ..updates.rank_one import RankOneSum
from ..updates.stacked import Stacked
from ..updates.update import Update, transposed

# A module, its rows of the tensor, the rows of its update that they are, whether that is transposed
Taken = tuple[str, torch.Tensor, torch.Tensor, bool]


def spread(run: Run, shape: tuple[int, int], taken: list[Taken]) -> Callable[[], Update]:
    """The update of a tensor of `shape`, of which modules of `run` are parts.

    An update that is no sum of components is taken as it is, for a tensor that holds all of its
    module: it may need every row of the weight. Raises `BaseError` when loading it where the module
    is spread over several tensors.
    """

    def load() -> Update:
        parts = [_part(run, *one) for one in taken]
        index, update = parts[0]
        alone = len(parts) == 1 and update.shape[0] == shape[0]
        if alone and torch.equal(index, torch.arange(shape[0])):
            return update
        return Stacked(shape, tuple(parts))

    return load


def _part(
    run: Run, module: str, own: torch.Tensor, index: torch.Tensor, flip: bool
) -> tuple[torch.Tensor, Update]:
    """The rows of the tensor, and the update of these."""
    update = run.updates[module]
    components = update.components()
    if components is not None:
        components = components.transposed() if flip else components
        return own, RankOneSum(components.a, components.c, components.b[index])
    update = transposed(update) if flip else update
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(update.shape[0])):
        raise BaseError(
            "this update cannot be spread over the tensors on disk: it is not low-rank",
            file=run.path,
            tensor=module,
        )
    return own[order], update
